"""The trained systems that COMI is compared with: one file each, as a row of ``model.systems``."""
