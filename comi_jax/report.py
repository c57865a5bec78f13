"""Plot training runs: ``python -m comi_jax.report RUN_DIR [RUN_DIR ...]``.

report.png has the curves; report.html is a self-contained page with curves, settings and results.
"""

from pathlib import Path

from comi_jax import cli
from comi_jax.runs.report import draw, read
from comi_jax.runs.report_page import page


def main(arguments: list[str] | None = None) -> None:
    """Write report.png and report.html."""
    parser = cli.Parser(prog="python -m comi_jax.report", description="Plot training runs.")
    parser.add_argument(
        "runs", type=cli.path, nargs="+", metavar="RUN_DIR", help="folders of training runs, overlaid in one plot"
    )
    parser.add_argument(
        "--output", type=cli.path, help="folder for report.png and report.html (default: the first RUN_DIR)"
    )
    given = parser.parse_args(arguments)
    output = Path(given.output or given.runs[0])
    with cli.one_way_out():
        courses = [course for folder in given.runs for course in read(Path(folder))]
        picture = draw(courses)
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.png").write_bytes(picture)
        (output / "report.html").write_text(page(courses, picture), encoding="utf-8")
    print(f"{output / 'report.png'}\n{output / 'report.html'}")


if __name__ == "__main__":
    main()
