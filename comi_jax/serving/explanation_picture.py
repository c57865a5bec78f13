"""An explanation as a picture: the text in groups, tokens shaded by their share of their vector. matplotlib is an extra
and is imported only here."""

import io
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from comi_jax.errors import ConfigError

COLUMNS = 84  # letters in a line
LINES = 260  # of a text at most; what is beyond is told
DPI, WIDTH, HEIGHT = 100, 0.07, 0.18  # inches of a letter and of a line: whole pixels, as letters are set at such
SIZE = WIDTH * 72 / 0.602  # points at which a letter of DejaVu Sans Mono is that wide
SHADE, BORDER, MUTED = np.array([245, 140, 20]) / 255, "#4a7fc1", "#5d6673"


def check() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a picture needs matplotlib; pip install 'comi-jax[report]', or leave --png out") from None


def draw(explanation: dict[str, Any], views: tuple[int, ...] = (0, 1)) -> bytes:
    """The PNG of some ``views`` of ``explanation``, the value of ``explanation.as_json``, side by side; those that do
    not exist are left out. Raises ConfigError if matplotlib is not installed."""
    check()
    from matplotlib.figure import Figure

    shown = [explanation["views"][i] for i in views if i < len(explanation["views"])]
    pages = [lay_out(explanation, view) for view in shown]
    rows = max(min(len(page.lines), LINES) for page in pages)
    head, gap, margin = 1.45, 0.3, 0.15
    wide = len(pages) * COLUMNS * WIDTH + (len(pages) - 1) * gap + 2 * margin
    high = rows * HEIGHT + head + 0.35
    figure = Figure(figsize=(wide, high), dpi=DPI)
    scale = _scale(shown)
    for number, (view, page) in enumerate(zip(shown, pages, strict=True)):
        left = margin + number * (COLUMNS * WIDTH + gap)
        box = (left / wide, 0.3 / high, COLUMNS * WIDTH / wide, rows * HEIGHT / high)
        _text(figure.add_axes(box), page, rows, view["tokens"]["weights"], scale)
        _head(figure, view, left / wide, high, wide)
    least, most = (f"{x * x:.1%}" for x in scale)
    caption = f"shade: a token's share of its memory vector, from {least} to {most}; small: tokens in a group"
    figure.text(margin / wide, 0.1 / high, caption, fontsize=7, color=MUTED)
    made = explanation.get("made", "")
    figure.text(1 - margin / wide, 0.1 / high, made, fontsize=7, color=MUTED, ha="right", parse_math=False)
    return _png(figure)


def _png(figure: Any) -> bytes:
    """The picture in 64 colours, a fifth of the bytes of one in all colours."""
    from PIL import Image

    drawn, picture = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # a box stands for a missing letter
        figure.savefig(drawn, format="png", pil_kwargs={"compress_level": 1})
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64).save(picture, format="png", optimize=True)
    return picture.getvalue()


@dataclass
class Line:
    """One line of a text: its letters, and what lies behind and above them, in columns."""

    letters: list[str] = field(default_factory=list)
    shades: list[tuple[int, int, int]] = field(default_factory=list)  # first and last column, token
    labels: list[tuple[int, int]] = field(default_factory=list)  # column, tokens in the group that begins there


@dataclass
class Page:
    """The lines of a text and the number of its tokens that they hold."""

    lines: list[Line]
    tokens: int


def lay_out(explanation: dict[str, Any], view: dict[str, Any]) -> Page:
    """The text broken into lines of COLUMNS, each group behind the number of its tokens; at most LINES of them. Each
    letter is in a line once, also where several tokens stand for it."""
    text, start, end = explanation["text"], explanation["tokens"]["start"], explanation["tokens"]["end"]
    group, size = view["tokens"]["group"], view["groups"]["size"]
    lines, done = [Line()], 0
    for token, (first, last) in enumerate(zip(start, end, strict=True)):
        begins = token == 0 or group[token] != group[token - 1]
        word = len(text[max(first, done) : last].strip("\n")) + begins * (len(str(size[group[token]])) + 1)
        for letter in text[done:first]:
            _put(lines, letter, None)
        if len(lines[-1].letters) + word > COLUMNS:
            lines.append(Line())
        if len(lines) > LINES:
            return Page(lines[:-1], token)
        if begins:
            lines[-1].labels.append((len(lines[-1].letters), size[group[token]]))
            lines[-1].letters += " " * (len(str(size[group[token]])) + 1)
        for letter in text[max(first, done) : last]:
            _put(lines, letter, token)
        done = max(done, last)
    return Page(lines, len(start))


def _put(lines: list[Line], letter: str, token: int | None) -> None:
    if letter == "\n" or len(lines[-1].letters) >= COLUMNS:
        lines.append(Line())
    if letter == "\n":
        return
    line = lines[-1]
    if token is not None:
        column = len(line.letters)
        if line.shades and line.shades[-1][1:] == (column, token):
            line.shades[-1] = (line.shades[-1][0], column + 1, token)
        else:
            line.shades.append((column, column + 1, token))
    line.letters.append(letter if letter.isprintable() else " ")


def _scale(views: list[dict[str, Any]]) -> tuple[float, float]:
    """The square roots of the shares that are palest and darkest."""
    roots = np.sqrt(np.concatenate([view["tokens"]["weights"] for view in views]))
    low, high = np.quantile(roots, (0.01, 0.99))
    return float(low), float(high)


def _text(axis: Any, page: Page, rows: int, weights: list[float], scale: tuple[float, float]) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    axis.set(xlim=(0, COLUMNS), ylim=(rows, 0))
    axis.axis("off")
    low, high = scale
    boxes, colours, borders = [], [], []
    style = {"family": "DejaVu Sans Mono", "va": "center", "parse_math": False}
    for y, line in enumerate(page.lines):
        for first, last, token in line.shades:
            boxes.append([(first, y + 0.1), (last, y + 0.1), (last, y + 0.9), (first, y + 0.9)])
            depth = np.clip((np.sqrt(weights[token]) - low) / max(high - low, 1e-9), 0, 1)
            colours.append((*SHADE, 0.8 * depth))
        for column, size in line.labels:
            borders.append([(column + 0.15, y + 0.05), (column + 0.15, y + 0.95)])
            axis.text(column + 0.4, y + 0.35, str(size), fontsize=SIZE * 0.62, color=MUTED, **style)
        text = "".join(line.letters)
        pieces = [(0, text)] if text.isascii() else enumerate(text)  # other letters may have another width
        for x, piece in pieces:
            if piece.strip():
                axis.text(x, y + 0.5, piece, fontsize=SIZE, color="#1b1e23", **style)
    axis.add_collection(PolyCollection(boxes, facecolors=colours, linewidths=0))
    axis.add_collection(LineCollection(borders, colors=BORDER, linewidths=1.2))
    if page.tokens < len(weights):
        axis.text(0, rows + 0.4, f"{len(weights) - page.tokens:,} further tokens are in the page and the JSON",
            fontsize=SIZE - 1, color="#b00020", **style)  # fmt: skip


def _head(figure: Any, view: dict[str, Any], left: float, high: float, wide: float) -> None:
    said, style = view["timings"], {"va": "top", "parse_math": False}
    first, compressed = (f"{said[name] * 1000:,.0f} ms" for name in ("first token", "compressed"))
    sizes = view["groups"]["size"]
    facts = (
        f"rate {view['rate']}: {view['context_tokens']:,} tokens in {view['memory_vectors']:,} vectors, ratio "
        f"{view['ratio']:.1f}; compressed in {compressed}, first token after {first}"
    )
    answer = f"{_short(view['answer'], 70) or '(an empty answer)'}   ({view['finish_reason']})"
    lines = ((_short(view["question"], 90), 9, "normal"), (answer, 11, "bold"), (facts, 7.5, "normal"))
    for at, (text, size, weight) in zip((0.1, 0.3, 0.55), lines, strict=True):
        figure.text(left, 1 - at / high, text, fontsize=size, fontweight=weight, **style)
    bars = figure.add_axes((left, 1 - 1.3 / high, COLUMNS * WIDTH / wide, 0.5 / high))
    bars.bar(np.arange(len(sizes)), sizes, 1.0, color=BORDER)
    bars.axhline(view["rate"], color=SHADE, linewidth=1)
    bars.set(xlim=(-0.5, len(sizes) - 0.5), xticks=[], yticks=[view["rate"], max(sizes)])
    bars.tick_params(labelsize=6, length=2, pad=1, direction="in")
    bars.spines[["top", "right"]].set_visible(False)


def _short(text: str, letters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 1] + "…"
