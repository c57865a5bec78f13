"""What is shown of a memory is what it was made of: values, groups and letters; a text is data, never markup."""

import dataclasses
import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import train_fixtures
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from comi_jax import evaluate, explain
from comi_jax.data.encode import token_spans
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.evaluation.diagnostics import anatomies, subjects
from comi_jax.serving import asking, explanation, explanation_picture
from comi_jax.serving.compressor import Comi
from comi_jax.serving.explanation_page import page

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

# 42 tokens: two segments, of 32 and 10.
TEXT = "\n".join(
    f"the {c} box holds a {t} ." for c, t in zip(train_fixtures.COLOURS[:6], train_fixtures.THINGS[:6], strict=True)
)
QUESTION = "what does the red box hold ?"
HOSTILE = "ë</script><script>alert(1)</script><!-- 東🙂{{data}}\u2028é"


@pytest.fixture(scope="module")
def model(world):
    return Comi.load(world.run, batch_size=2)


@pytest.fixture(scope="module")
def made(model):
    """The explanation of TEXT at two rates, and its JSON read back."""
    source = explanation.encode(model, TEXT)
    views = [explanation.explain(model, source, QUESTION, rate) for rate in (2, 4)]
    return source, views, json.loads(json.dumps(explanation.as_json(source, views, {})))


@pytest.fixture(scope="module")
def hostile(world, model):
    """The JSON of a text of markup and of letters of 1 to 4 tokens each, one for each of their bytes in UTF-8."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    used = sorted({byte for word, _ in letters.pre_tokenize_str(HOSTILE) for byte in word})
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(used)}, []))
    backend.pre_tokenizer = letters
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    of_bytes = Comi(model.run, model.params, tokenizer, batch_size=2)
    source = explanation.encode(of_bytes, HOSTILE)
    assert source.document.tokens == len(HOSTILE.encode())
    return explanation.as_json(source, [explanation.explain(of_bytes, source, "ë{{data}}<!--", 4)], {})


def test_the_json_has_the_values_of_the_memory(model, made):
    """Bit by bit those of the program that made the memory, and those of the computation in one pass."""
    source, views, read = made
    record = Record((TEXT,), QUESTION, ())
    for view, shown in zip(views, read["views"], strict=True):
        (asked,) = asking.ask(model, [source.document], [QUESTION], {"rate": view.rate}, 4)
        parts = asking.examine(model, asked)
        assert read["segments"] == [32, 10] and len(parts) == 2
        for name in ("weights", "relevance", "redundancy", "mig"):
            values = np.concatenate([getattr(aux, name)[:n] for aux, n in zip(parts, (32, 10), strict=True)])
            assert values.dtype == np.float32
            np.testing.assert_array_equal(np.asarray(shown["tokens"][name], np.float32), values)
        (anatomy,) = anatomies(model, subjects([record], model), view.rate)
        np.testing.assert_allclose(shown["tokens"]["weights"], anatomy.weights, atol=1e-5)
        assert shown["groups"]["size"] == anatomy.final.sizes.tolist()
        assert shown["initial"]["allocated"] == anatomy.allocated.tolist()
        np.testing.assert_allclose(shown["initial"]["share"], anatomy.share, atol=1e-5)
        np.testing.assert_allclose(shown["initial"]["mig"], anatomy.initial.mig, atol=1e-5)
    answers = [model.answer(source.document, QUESTION, rate=rate) for rate in (2, 4)]
    assert [view.answer for view in views] == answers
    assert [shown["answer"] for shown in read["views"]] == [answer.text for answer in answers]


def test_groups_cover_the_tokens_and_shares_sum_to_one(made, hostile):
    source, _, read = made
    for view, count in [*((view, source.document.tokens) for view in read["views"]),
                        (hostile["views"][0], len(HOSTILE.encode()))]:  # fmt: skip
        tokens, groups, initial = view["tokens"], view["groups"], view["initial"]
        first, size = np.array(groups["first"]), np.array(groups["size"])
        assert first[0] == 0 and (first[1:] == (first + size)[:-1]).all() and (first + size)[-1] == count
        assert tokens["group"] == np.repeat(np.arange(len(size)), size).tolist()
        assert len(size) == view["memory_vectors"]
        np.testing.assert_allclose(np.add.reduceat(tokens["weights"], first), 1, atol=1e-5)
        assert sum(initial["size"]) == sum(initial["allocated"]) == count
        assert [n for n in initial["allocated"] if n] == groups["size"]
        for at, begin, wide in zip(initial["token"], initial["first"], initial["size"], strict=True):
            own = tokens["relevance"][begin : begin + wide]
            assert begin <= at < begin + wide and tokens["relevance"][at] == max(own)  # (4)


def test_without_the_coarse_stage_there_are_no_groups_before(world):
    flat = Comi.load(world.run, overrides=["compression.coarse=false"])
    view = explanation.explain(flat, explanation.encode(flat, TEXT), QUESTION, 4)
    assert view.kept.initial is None and view.kept.groups["size"].tolist() == [4] * 8 + [5, 5]


def test_letters_of_several_tokens_come_back(hostile):
    start, end = hostile["tokens"]["start"], hostile["tokens"]["end"]
    widths = [end - begin for begin, end in zip(start, end, strict=True)]
    assert widths == [1] * len(HOSTILE.encode())
    done, letters = 0, ""
    for first, last in zip(start, end, strict=True):
        letters, done = letters + HOSTILE[max(done, first) : last], max(done, last)
    assert letters == hostile["text"] == HOSTILE
    assert start.count(HOSTILE.index("🙂")) == 4
    drawn = explanation_picture.lay_out(hostile, hostile["views"][0]).lines
    shown = "".join(line.letters[x] for line in drawn for a, b, _ in line.shades for x in range(a, b))
    assert shown == HOSTILE.replace("\u2028", " ")


class Elements(html.parser.HTMLParser):
    """The names of a page's elements, and what is in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.names, self.scripts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self._inside = tag == "script"

    def handle_data(self, data):
        if self._inside:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._inside = False


def test_a_text_is_no_markup(hostile, made):
    text = page(hostile)
    found, plain = Elements(text), Elements(page(made[2]))
    assert found.names == plain.names and found.scripts[1] == plain.scripts[1]
    assert json.loads(found.scripts[0]) == hostile
    assert found.scripts[0].isascii() and "alert(" in text
    assert "<script>alert" not in text and "<!--" not in text


def test_a_page_needs_nothing_else(made):
    text = page(made[2])
    assert "default-src 'none'" in text and not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(", text)


def words(world, tmp_path, *more):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return [f"--checkpoint={world.run}", f"--context={tmp_path / 'a.txt'}", *more]


def test_the_command_writes_all_three(world, made, tmp_path, capsys):
    paths = {name: tmp_path / f"made.{name}" for name in ("output", "json", "png")}
    explain.main(
        words(world, tmp_path, f"--question={QUESTION}", "--question=what holds a coin ?", "--rates", "2", "4", "2",
            *(f"--{name}={path}" for name, path in paths.items()))
    )  # fmt: skip
    written = json.loads(paths["json"].read_text())
    assert [(view["question"][-6:], view["rate"]) for view in written["views"]] == [
        ("hold ?", 2), ("hold ?", 4), ("coin ?", 2), ("coin ?", 4),
    ]  # fmt: skip
    for view, known in zip(written["views"], made[2]["views"], strict=False):
        assert {**view, "timings": 0} == {**known, "timings": 0}
    assert json.loads(Elements(paths["output"].read_text()).scripts[0]) == written
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert all(view["answer"] in capsys.readouterr().out for view in written["views"][:1])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--question=", "--output=a"], "--question is empty; give it some text"),
        (["--question=what ?", "--output=no/where.html"], "--output=no/where.html is in no, which is no folder; make"),
        (["--question=what ?", "--output=."], "--output=. is a folder; give the path of a file"),
        (["--question=what ?", "--json=a", "--output=a"], "name the same file; give each its own"),
        (["--question=what ?"], "nothing would be written; give --output=page.html, --json or --png"),
        (["--question=what ?", "--output=a", "--context=nowhere.txt"], "--context=nowhere.txt cannot be read"),
        (["--question=what ?", "--output=a", "--context=empty.txt"], "--context=empty.txt is empty; give a file"),
        (["--question=what ?", "--output=a", "--context=long.txt"], "80 tokens, more than data.max_context"),
        (["--question=what ?", "--output=a", "--set=compression.rates=1"], "no rate above 1; give --rates"),
        (["--question=what ?", "--output=a", "--checkpoint=nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_refused(world, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n", encoding="utf-8")
    Path("long.txt").write_text("box " * 80, encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}") as left:
        explain.main(words(world, tmp_path, *more))
    assert "\n" not in str(left.value)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "a.txt"] == before


@pytest.mark.parametrize("rate", ["x", "2.5", "1", "-4"])
def test_a_rate_that_is_no_whole_number_is_refused(world, tmp_path, capsys, rate):
    with pytest.raises(SystemExit):
        explain.main(words(world, tmp_path, "--question=what ?", "--output=a", f"--rates={rate}"))
    assert f"{rate} is not a whole number of at least 2" in capsys.readouterr().err


def test_another_system_is_refused(model):
    run = dataclasses.replace(model.run, config=dataclasses.replace(model.run.config, system="full_prompt"))
    other = Comi(run, model.params, model.tokenizer)
    with pytest.raises(ConfigError, match="of system=full_prompt, which has no MIG; pass one of system=comi"):
        explanation.encode(other, TEXT)


def test_the_characters_of_a_token_are_those_of_the_tokenizer(model):
    assert explanation.encode(model, TEXT).characters.tolist() == [[*s] for s in token_spans(model.tokenizer, TEXT)]


def test_pages_for_the_worst_answers(world, tmp_path):
    folder = tmp_path / "out" / "explanations"
    folder.mkdir(parents=True)
    (folder / "record_99.html").write_text("of an earlier evaluation")
    evaluate.main(
        [f"--checkpoint={world.run}", f"--data={world.dev}", f"--output={tmp_path / 'out'}", "--explain-worst=2"]
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["f1_max"])
    pages = sorted(folder.iterdir())
    assert len(pages) == 2
    for path in pages:
        number = int(path.stem.removeprefix("record_"))
        shown = json.loads(Elements(path.read_text()).scripts[0])["views"][0]
        (row,) = (row for row in rows if row["index"] == number - 1)
        assert row["f1_max"] <= rows[1]["f1_max"]
        assert shown["question"] == row["prompt"] and shown["answer"] == row["prediction"]
        assert dict(shown["notes"])["answer in the evaluation"] == row["prediction"]
        assert dict(shown["notes"])[f"record {number}, references"] == " | ".join(row["answers"])


@pytest.mark.parametrize(
    "flag, message", [("--closed-book", "--closed-book has none; leave one out"), ("--rate=1", "rate 1 nothing is")]
)
def test_answers_that_cannot_be_explained_are_refused_first(world, tmp_path, flag, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        evaluate.main(
            [f"--checkpoint={world.run}", f"--data={world.dev}", f"--output={tmp_path}", "--explain-worst=2", flag]
        )
    assert not (tmp_path / "predictions.jsonl").exists()


@pytest.fixture
def browser():
    """Headless Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser, tmp_path, explanation, **options):
    """The page of ``explanation`` in a tab, and what it complained about or asked the network for."""
    (tmp_path / "page.html").write_text(page(explanation), encoding="utf-8")
    tab, told = browser.new_page(**{"viewport": {"width": 1300, "height": 900}, **options}), []
    tab.set_default_timeout(120_000)
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("console", lambda message: told.append(message.text))
    tab.on("dialog", lambda dialog: told.append(dialog.message))
    tab.on("request", lambda request: None if request.url.startswith("file:") else told.append(request.url))
    tab.goto((tmp_path / "page.html").as_uri())
    tab.wait_for_selector(".g")
    return tab, told


def texts(tab):
    """The text of each pane."""
    return tab.evaluate(
        "shown.map((_, pane) => [...document.querySelectorAll('.row')].map("
        "row => row.querySelectorAll('.cell')[pane].textContent).join(''))"
    )


@pytest.mark.slow
def test_clicking_through_the_page(browser, tmp_path, made):
    explanation = made[2]
    tab, told = opened(browser, tmp_path, explanation)
    first, second = explanation["views"]
    assert texts(tab) == [TEXT, TEXT]
    pane = '.g[data-pane="{}"][data-slot="{}"]'.format
    sizes = tab.eval_on_selector_all('.g[data-pane="1"]', "all => all.map(g => g.dataset.size)")
    assert [int(size) for size in sizes if size != "…"] == second["groups"]["size"]
    tab.hover(pane(1, 2))
    assert tab.inner_text("#panel h2") == f"B: slot 3 of {second['memory_vectors']}"
    begin, size = (second["groups"][name][2] for name in ("first", "size"))
    start, end = explanation["tokens"]["start"][begin], explanation["tokens"]["end"][begin + size - 1]
    assert tab.text_content("#panel .text") == TEXT[start:end]
    rows = tab.locator("#panel > table tr").all_inner_texts()[1:]
    shares = sorted(second["tokens"]["weights"][begin : begin + size], reverse=True)
    shown = [float(row.split("\t")[1].removesuffix("%")) / 100 for row in rows]
    assert shown == pytest.approx(shares[:8], rel=6e-3)
    tab.click(pane(0, 1))
    tab.hover(pane(1, 0))  # a slot that was clicked stays
    assert tab.inner_text("#panel h2") == f"A: slot 2 of {first['memory_vectors']}"
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#panel h2").startswith("A: slot 3 of")
    tab.keyboard.press("End")
    assert tab.inner_text("#panel h2").startswith(f"A: slot {first['memory_vectors']} of")
    assert tab.evaluate("document.activeElement.dataset.slot") == str(first["memory_vectors"] - 1)
    tab.click('#panel [aria-label="previous slot"]')
    assert tab.input_value("#number") == str(first["memory_vectors"] - 1)

    def shades():
        return tab.eval_on_selector_all('.g[data-pane="0"] > [data-token]', "all => all.map(t => t.className)")

    seen = {"weights": shades()}
    for measure in ("relevance", "redundancy", "mig"):
        tab.select_option("#measure", measure)
        seen[measure] = shades()
        order = np.argsort(first["tokens"][measure], kind="stable")
        depth = np.array([int(name[1:]) for name in seen[measure]])[order]
        assert (np.diff(depth) >= 0).all() and len(set(depth)) > 3
    assert len({tuple(shade) for shade in seen.values()}) == 4
    tab.select_option("#second", "")
    assert texts(tab) == [TEXT] and tab.locator(".card canvas").count() == 1
    tab.select_option("#first", "1")
    assert tab.inner_text(".answer") == (second["answer"].strip() or "(an empty answer)")
    assert tab.inner_text("#panel h2").endswith(f"of {second['memory_vectors']}")
    assert told == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_markup_is_shown_as_text_in_either_scheme_on_a_narrow_screen(browser, tmp_path, hostile, scheme):
    tab, told = opened(browser, tmp_path, hostile, color_scheme=scheme, viewport={"width": 400, "height": 800})
    assert texts(tab) == [HOSTILE] and told == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    bright = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (bright > 200) == (scheme == "light")
    assert not tab.is_visible("#panel")
    tab.click(".g >> nth=1")
    assert tab.is_visible("#panel")
    tab.click("#close")
    assert not tab.is_visible("#panel")


@pytest.mark.slow
def test_of_a_long_text_only_what_is_near_is_drawn(browser, tmp_path, made):
    """Five hundred times the text: the elements are as many as a window needs, and the last slot is reached."""
    explanation, times = json.loads(json.dumps(made[2])), 500
    count, slots = sum(explanation["segments"]), [view["memory_vectors"] for view in explanation["views"]]
    explanation["text"] = (TEXT + "\n") * times
    for name, values in explanation["tokens"].items():
        explanation["tokens"][name] = [at + k * (len(TEXT) + 1) for k in range(times) for at in values]
    for view, m in zip(explanation["views"], slots, strict=True):
        view["memory_vectors"] = m * times
        for part, moved in (("tokens", {"group": m}), ("groups", {"first": count, "segment": 2}),
                            ("initial", {"first": count, "token": count, "segment": 2})):  # fmt: skip
            for name, values in view[part].items():
                view[part][name] = [v + k * moved.get(name, 0) for k in range(times) for v in values]
    explanation["segments"] *= times
    tab, told = opened(browser, tmp_path, explanation)
    assert texts(tab) == [explanation["text"]] * 2
    assert 0 < tab.locator("[data-token]").count() < 6000
    tab.evaluate(f"go(0, {slots[0] * times - 1}, true)")
    assert tab.evaluate("document.activeElement.dataset.slot") == str(slots[0] * times - 1)
    assert tab.inner_text("#panel h2").startswith(f"A: slot {slots[0] * times} of")
    tab.wait_for_timeout(1000)
    assert 0 < tab.locator("[data-token]").count() < 6000
    assert told == []
