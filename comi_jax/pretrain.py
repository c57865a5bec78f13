"""Pretrain the tiny language model bundled with the package: ``python -m comi_jax.pretrain --output=DIR``."""

from pathlib import Path

from comi_jax import cli
from comi_jax.data import synthetic
from comi_jax.errors import UserError
from comi_jax.training.pretraining import VOCABULARY, pretrain, save, shape


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.Parser(prog="python -m comi_jax.pretrain", description="Pretrain the tiny language model.")
    parser.add_argument("--output", type=cli.path, required=True, help="folder to write; must not hold a model yet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with cli.one_way_out():
        output = Path(options.output)
        if (output / "config.json").exists():
            raise UserError(f"{output} already holds a model; give another --output")
        texts = synthetic.corpus(options.seed, 3000) + synthetic.corpus(options.seed + 1, 1000, notes=0.5)
        tokenizer = synthetic.train_tokenizer(texts, VOCABULARY)
        backbone = shape(len(tokenizer))
        save(output, pretrain(tokenizer, backbone, options.seed), backbone, tokenizer)


if __name__ == "__main__":
    main()
