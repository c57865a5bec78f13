"""Files and settings made to break their readers are read right or refused in one sentence: no traceback, no hang."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comi_jax import overrides
from comi_jax.backbone import Backbone
from comi_jax.config import Config
from comi_jax.data import adapters, sources
from comi_jax.data.records import DataError, Record, Skipped, numbered_records, read_records, record_of
from comi_jax.errors import ConfigError
from comi_jax.weights import hf_config
from comi_jax.weights.hf_config import MAX_CONFIG_BYTES

pytestmark = pytest.mark.fault

# Some hundreds of inputs in every run; 10,000 with `-m slow`.
trials = pytest.mark.parametrize("trials", [80, pytest.param(2_500, marks=pytest.mark.slow)])

# --- what hostile input is made of ------------------------------------------------------------------------------------

WORDS = [
    "input",
    "prompt",
    "answer",
    "context",
    "question",
    "answers",
    "ctxs",
    "document",
    "title",
    "sentences",
    "text",
]
NUMBERS = [
    "1e999",
    "-1e999",
    "9" * 400,
    "9" * 5000,
    "NaN",
    "-Infinity",
    "0",
    "-1",
    "2.5",
    "1e-400",
    "18446744073709551616",
]
TEXTS = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "Co", "Cn"]), max_size=4),
    st.sampled_from(["", " ", "\0", "\ud83d", "a\0b", "x" * 3000, "\u2028", "[[]]", '{"title": [], "sentences": []}']),
)
LEAVES = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(["null", "true", "false"]), TEXTS.map(json.dumps), st.just("[" * 3000)
)
# JSON as text, so that it can hold what no Python value can: numbers out of range, a key twice, an end too soon.
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda parts: f"[{','.join(parts)}]")
        | st.lists(st.tuples(st.sampled_from(WORDS) | TEXTS, inner), max_size=5).map(
            lambda pairs: "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=12,
)
OURS = st.tuples(JSON, JSON, JSON).map(lambda v: f'{{"input":{v[0]},"prompt":{v[1]},"answer":{v[2]}}}')
GOOD = b'{"input": ["one", "two"], "prompt": "q", "answer": "a"}'
GOOD_RECORD = Record(("one", "two"), "q", ("a",))
LINES = st.one_of(
    st.just(GOOD),
    st.binary(max_size=60),
    st.one_of(JSON, OURS).map(str.encode),
    st.tuples(OURS.map(str.encode), st.integers(0, 80)).map(lambda cut: cut[0][: cut[1]]),
).map(lambda line: line.replace(b"\n", b" "))


def value_of(text):
    """A Python value of hostile JSON, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


NASTY = [10**400, 10**4000, 2**63, -1, 0, float("inf"), float("nan"), True, None, "x", "\ud83d", "a\0b", "9" * 400]
VALUES = st.sampled_from(NASTY) | JSON.map(value_of) | st.builds(dict) | st.builds(list)


def one_sentence(error):
    return str(error).isprintable() and len(str(error)) < 2_000


# --- records ----------------------------------------------------------------------------------------------------------


def _tuple(value):
    return tuple(value) if isinstance(value, list) else (value,)


def check_file(path, lines, packed, cut):
    content = b"\n".join(lines)
    content = gzip.compress(content, 1) if packed else content
    path.write_bytes(content[: len(content) * cut // 100])
    skipped, kept = [], []
    try:
        for number, record in numbered_records(path, record_of, skipped=skipped):
            kept.append((number, record))
    except DataError as error:
        assert error.path == str(path) and one_sentence(error)
        if not packed and content.startswith((b"\x1f\x8b", b"version https://git-lfs.github.com/spec/")):
            return  # which is how gzip and a Git LFS pointer begin
        if cut == 100 and kept:
            raise AssertionError("a whole file with a record in it is read to its end") from error
    try:  # the other schemas
        assert all(isinstance(r, Record) for _, r in numbered_records(path, adapters.adapt, skipped=[]))
    except DataError as error:
        assert one_sentence(error)
    for number, record in kept if cut == 100 else kept[:-1]:
        fields = json.loads(lines[number - 1])
        assert record == Record(_tuple(fields["input"]), fields["prompt"], _tuple(fields["answer"]))
    assert all(isinstance(line, Skipped) and one_sentence(line) for line in skipped)
    if cut == 100:
        good = [number for number, line in enumerate(lines, 1) if line == GOOD]
        assert [number for number, record in kept if record == GOOD_RECORD] == good
        told = {number for number, _ in kept} | {line.line for line in skipped}
        assert told == {number for number, line in enumerate(lines, 1) if line.strip(b" \t\r\f\v")}


@trials
def test_files_of_anything_are_read_right_or_refused_line_by_line(trials, tmp_path):
    @settings(max_examples=trials, deadline=None, derandomize=True, database=None)
    @given(st.lists(LINES, max_size=6), st.booleans(), st.sampled_from([100, 100, 100, 95, 50, 10]))
    def run(lines, packed, cut):
        check_file(tmp_path / "x.jsonl", lines, packed, cut)

    run()


CHILD = """
import sys, time
from comi_jax.data import records
def lines(path):
    match sys.argv[2]:
        case "one text": yield b'{"input": "' + b"a" * 100_000_000 + b'", "prompt": "q", "answer": "a"}'
        case "objects": yield b'{"input": [' + b"{}," * 5_500_000 + b'{}], "prompt": "q", "answer": "a"}'
        case "pairs": yield b'{"input": [' + b'["ab"],' * 2_300_000 + b'[]], "prompt": "q", "answer": "a"}'
        case "names": yield b"{" + b",".join(b'"%d":0' % i for i in range(1_400_000)) + b',"7":0}'
        case "short": yield b"x\\n" * 20_000_000
        case "blank": yield b" \\n" * 20_000_000
with open(sys.argv[1], "wb") as f:
    for line in lines(f): f.write(line + b"\\n")
start = time.process_time()
try:
    records.read_records(sys.argv[1], skip_bad=True)
except records.DataError as error:
    print(error)
# getrusage would count what the parent had, too
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) * 1024, time.process_time() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["one text", "objects", "pairs", "names", "short", "blank"])
def test_huge_lines_take_less_than_a_gigabyte(tmp_path, shape):
    path = tmp_path / "x.jsonl"
    command = [sys.executable, "-c", CHILD, str(path), shape]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    *message, numbers = done.stdout.splitlines()
    memory, seconds = map(float, numbers.split())
    assert len(message) == 1 and message[0].startswith(str(path))
    assert memory < 1e9 and seconds < 60, (memory, seconds)


def test_a_line_of_a_hundred_megabytes_is_refused_within_a_gigabyte(tmp_path):
    """The child writes the file too, and all of it is within its address space."""
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as f:
        f.write(GOOD + b'\n{"input": "')
        for _ in range(100):
            f.write(b"a" * 1_000_000)
        f.write(b'", "prompt": "q", "answer": "a"}\n' + GOOD)
    code = (
        "import sys; from comi_jax.data.records import read_records; "
        "records, report = read_records(sys.argv[1], skip_bad=True); "
        # getrusage would count what the parent had, too
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')); "
        "print(len(records), report.skipped[0].line, peak)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    kept, line, memory = map(int, done.stdout.split())
    assert (kept, line) == (2, 2) and memory * 1024 < 1e9


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        with pytest.raises(DataError, match="is not a regular file"):
            read_records(path)


def test_a_key_twice_among_many_is_found_at_once(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b',"99999":0}')
    with pytest.raises(DataError, match='line 1: field "99999" occurs 2 times'):
        read_records(path)


def test_more_bad_lines_than_any_report_holds_are_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("comi_jax.data.records.MAX_SKIPPED", 3)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"?", b"?", b"?"]))
    assert len(read_records(path, skip_bad=True)[1].skipped) == 3
    path.write_bytes(b"\n".join([GOOD, b"?", b"?", b"?", GOOD, b"?", GOOD]))
    with pytest.raises(DataError, match="line 6: more than 3 lines are not records; this one: broken JSON"):
        read_records(path, skip_bad=True)


# --- settings ---------------------------------------------------------------------------------------------------------

SETTINGS = [
    f"{s}.{leaf}" for s, entry in overrides.to_dict(Config()).items() if isinstance(entry, dict) for leaf in entry
]
HOSTILE_TEXT = (
    TEXTS | JSON | st.sampled_from([*NUMBERS, "inf", "1_0", "0x10", "٣", "1,,2", "=", "true", " 1 ", "a," * 2000])
)
OVERRIDES = st.one_of(TEXTS, st.tuples(st.sampled_from(SETTINGS) | TEXTS, HOSTILE_TEXT).map("=".join))


@trials
def test_overrides_of_anything_give_a_config_or_one_sentence(trials):
    @settings(max_examples=trials, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(["tiny", "qwen2"]) | TEXTS, st.lists(OVERRIDES, max_size=3))
    def run(name, words):
        try:
            loaded = overrides.load(name, words)
        except ConfigError as error:
            assert one_sentence(error)
        else:
            assert overrides.from_dict(Config, overrides.to_dict(loaded)) == loaded
            json.dumps(overrides.to_dict(loaded), ensure_ascii=False).encode()  # it can be saved

    run()


@trials
def test_sources_of_any_name_are_refused_in_one_sentence(trials, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[").mkdir()

    @settings(max_examples=trials, deadline=None, derandomize=True, database=None)
    @given(st.text(st.sampled_from("ab:@1.*[]?#nq!-~"), max_size=12) | TEXTS.filter(bool) | st.just("a/" * 3000))
    def run(word):
        if word.partition(":")[2].startswith(sources.HUB) or word.startswith(sources.HUB):
            return
        try:
            overrides.override(Config(), [f"data.train={word}"])
            sources.read([word], "train")
        except (ConfigError, DataError) as error:
            assert one_sentence(error) or len(word) > 1_000
        else:
            raise AssertionError(f"{word!r} was read")

    run()


@st.composite
def damaged(draw, values):
    """``values`` with some entries replaced, dropped or put in."""
    out = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(0, 3))):
        place = out
        while True:
            key = draw(st.sampled_from(sorted(place)) | TEXTS) if place else draw(TEXTS)
            if not (isinstance(place.get(key), dict) and draw(st.integers(0, 3))):
                break
            place = place[key]
        if draw(st.integers(0, 5)):
            place[key] = draw(VALUES)
        else:
            place.pop(key, None)
    return out


@trials
def test_saved_settings_of_anything_give_a_config_or_one_sentence(trials):
    backbone = {name: 8 for name in Backbone.__dataclass_fields__} | {"model_type": "llama"}

    @settings(max_examples=trials, deadline=None, derandomize=True, database=None)
    @given(damaged(overrides.to_dict(Config())), damaged(backbone))
    def run(values, shape):
        for cls, given_values in ((Config, values), (Backbone, shape)):
            try:
                read = overrides.from_dict(cls, given_values)
            except ConfigError as error:
                assert one_sentence(error)
            else:
                again = json.loads(json.dumps(dataclasses.asdict(read), allow_nan=False))
                assert overrides.from_dict(cls, again) == read

    run()


REAL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131_072, "hidden_act": "silu",
    "tie_word_embeddings": True, "layer_types": ["full_attention"] * 2, "eos_token_id": [128_001],
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@trials
def test_a_models_config_of_anything_gives_a_backbone_or_one_sentence(trials, tmp_path):
    path = tmp_path / "config.json"
    bad_bytes = st.binary(max_size=80) | JSON.map(str.encode)

    @settings(max_examples=trials, deadline=None, derandomize=True, database=None)
    @given(damaged(REAL).map(lambda v: json.dumps(v).encode()) | bad_bytes, st.sampled_from([100, 100, 60]))
    def run(content, cut):
        path.write_bytes(content[: len(content) * cut // 100])
        for read in (hf_config.read_config, hf_config.stop_tokens, hf_config.is_base):
            try:
                read(tmp_path)
            except ConfigError as error:
                assert one_sentence(error) and str(tmp_path) in str(error)

    run()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"vocab_size": True}, "vocab_size"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads 0"),
        ({"num_attention_heads": 10**400}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads is '8', not a whole number"),
        ({"head_dim": "64"}, "head_dim is '64', not a whole number"),
        ({"rms_norm_eps": []}, r"rms_norm_eps is \[\], not a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": float("inf"), "rope_scaling": None}, "rope_theta is inf"),
        ({"rope_theta": -1.0, "rope_scaling": None}, "rope_theta is -1.0"),
        ({"rope_scaling": 3}, "rotary embeddings are 3; an object"),
        ({"rope_scaling": REAL["rope_scaling"] | {"factor": 0}}, "factor 0.0"),
        ({"rope_scaling": REAL["rope_scaling"] | {"high_freq_factor": 1.0}}, "high one above the low"),
        ({"layer_types": 3}, "layer_types=3"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is a whole number beyond"),
        ({"x" * 5000: [[[[1]]]]}, "not implemented"),
    ],
)
def test_a_models_config_with_wrong_numbers_names_them(change, named):
    with pytest.raises(ConfigError, match=named) as refused:
        hf_config.backbone_of(REAL | change, "here")
    assert one_sentence(refused.value)


@pytest.mark.parametrize(
    "cls, section, change, named",
    [
        (Config, "lora", {"alpha": 10**400}, "config.lora.alpha is a whole number beyond 64 bits"),
        (Config, "train", {"steps": 10**4000}, "config.train.steps is a whole number beyond 64 bits"),
        (Config, "train", {"output": "\udc80"}, "config.train.output is '.udc80'; text must not hold NUL"),
        (Config, "data", {"train": ["a\0b"]}, "config.data.train is 'a.x00b'; text must not hold NUL"),
        (Config, "data", {"x" * 5000: 1}, "config.data has unknown entries"),
        (Backbone, None, {"vocab_size": 3}, "config lacks model_type, hidden_size"),
    ],
)
def test_settings_with_wrong_values_are_named(cls, section, change, named):
    with pytest.raises(ConfigError, match=named) as refused:
        overrides.from_dict(cls, {section: change} if section else change)
    assert one_sentence(refused.value)


def test_the_undamaged_ones_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REAL))
    assert hf_config.read_config(tmp_path).rope_scaling.factor == 32.0 and hf_config.stop_tokens(tmp_path) == (128_001,)
    (tmp_path / "config.json").write_text(json.dumps(REAL) + " " * MAX_CONFIG_BYTES)
    with pytest.raises(ConfigError, match="has 1049... bytes"):
        hf_config.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not valid JSON"):
        hf_config.read_config(tmp_path)
