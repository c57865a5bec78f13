"""What a run would need, before there are devices for it."""
