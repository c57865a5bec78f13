"""What conversion refuses, in a sentence, with nothing written: broken, harmful and unsuitable files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import train_fixtures
from convert_fixtures import (
    assert_same,
    change_config,
    command,
    import_official,
    language_model,
    official_file,
    refusal,
)
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    lm = language_model(tmp_path / "lm", "qwen2")
    tokenizer = train_fixtures.tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(tiny_models.BACKBONES["qwen2"].vocab_size)])
    tokenizer.save_pretrained(lm)
    said = refusal("import-hf", f"--backbone={lm}", f"--output={tmp_path / 'comi'}", "--encoder-layers=1")
    assert "tokens, the model only" in said and not (tmp_path / "comi").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A language model in shards, and an official file of it."""
    folder = tmp_path_factory.mktemp("whole")
    language_model(folder / "lm", "qwen2", shard="20KB")
    return folder / "lm", official_file(folder / "theirs", "qwen2", 0)[0]


def header(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def truncate(lm, official_path):
    official_path.write_bytes(official_path.read_bytes()[:-64])


def lie(lm, official_path):
    """The header says that a tensor is larger than it is."""
    said, body = header(official_path)
    said["encoder.model.norm.weight"]["shape"] = [64]
    text = json.dumps(said).encode()
    official_path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def endless(lm, official_path):
    official_path.write_bytes((2**60).to_bytes(8, "little") + official_path.read_bytes()[8:])


def drop_shard(lm, official_path):
    sorted(lm.glob("model-*.safetensors"))[1].unlink()


def name_no_file(lm, official_path):
    point_index(lm, "model-99999-of-00002.safetensors")


def leave_folder(lm, official_path):
    point_index(lm, "../model.safetensors")


def point_index(lm, name):
    path = lm / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))


def other_architecture(lm, official_path):
    change_config(lm, model_type="mistral", architectures=["MistralForCausalLM"])


def other_width(lm, official_path):
    change_config(lm, hidden_size=64)


def not_finite(lm, official_path):
    tensors = load_file(official_path)
    tensors["encoder.model.norm.weight"][3] = np.nan
    tensors["decoder.model.layers.2.mlp.up_proj.weight"][5, 7] = np.inf
    save_file(tensors, official_path)


def several_dtypes(lm, official_path):
    tensors = load_file(official_path)
    name = "decoder.model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, official_path)


@pytest.mark.parametrize(
    "broken, said",
    [
        (truncate, "cannot be read as safetensors"),
        (lie, "cannot be read as safetensors"),
        (endless, "cannot be read as safetensors"),
        (drop_shard, "names files that are not there: model-00002-of-"),
        (name_no_file, "names files that are not there: model-99999-of-00002.safetensors"),
        (leave_folder, "names files outside its own folder"),
        (other_architecture, "model_type is 'mistral'; implemented are llama, qwen2, qwen3"),
        (other_width, "has shape (61, 32), expected (61, 64)"),
        (not_finite, "decoder.model.layers.2.mlp.up_proj.weight"),
        (several_dtypes, "different dtypes in different layers"),
    ],
)
def test_broken_weights_are_refused_in_a_sentence(whole, broken, said, tmp_path):
    lm, file = (shutil.copytree(whole[0], tmp_path / "lm"), shutil.copy(whole[1], tmp_path))
    broken(lm, Path(file))
    words = ("import-official", f"--checkpoint={file}", f"--backbone={lm}", f"--output={tmp_path / 'out'}")
    if broken in (drop_shard, name_no_file, leave_folder):
        words = ("import-hf", f"--backbone={lm}", f"--output={tmp_path / 'out'}", "--encoder-layers=2")
        assert said in refusal("inspect", lm)
    elif broken not in (other_width, not_finite, several_dtypes):
        assert said in refusal("inspect", lm if broken is other_architecture else file)
    message = refusal(*words)
    assert said in message
    if broken is not_finite:
        assert "encoder.model.norm.weight" in message and "2 tensor(s)" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_into(whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    words = (f"--backbone={whole[0]}", f"--output={tmp_path / 'out'}", "--encoder-layers=2")
    assert "exists and is not empty" in refusal("import-hf", *words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]


def test_a_tensor_in_two_files_is_refused(whole, tmp_path):
    lm = shutil.copytree(whole[0], tmp_path / "lm")
    first, second = sorted(lm.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    assert f"several files contain {name}" in refusal("inspect", lm)


def test_what_an_official_file_says_itself_cannot_be_told(whole, tmp_path):
    words = (f"--checkpoint={whole[1]}", f"--backbone={whole[0]}", f"--output={tmp_path / 'out'}")
    said = refusal("import-official", *words, "compression.alpha_fine=4", "lora.rank=3", "compression.fine=false")
    assert "compression.alpha_fine=4, lora.rank=3 cannot be set, as the checkpoint determines it" in said


class Harmful:
    """Unpickled by a careless reader, it runs code."""

    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_bin_files_are_read_as_plain_tensors(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {
        name.replace("encoder.", "icae.", 1) if name.startswith("encoder.") else name: torch.from_numpy(x).bfloat16()
        for name, x in load_file(whole[1]).items()
    }
    names = sorted(tensors)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    (tmp_path / "bin").mkdir()
    for file, own in parts.items():
        torch.save({name: tensors[name] for name in own}, tmp_path / "bin" / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ours = import_official(tmp_path / "bin", whole[0], tmp_path / "comi")
    command("export-official", f"--checkpoint={ours}", f"--output={tmp_path / 'back.safetensors'}")
    back = load_file(tmp_path / "back.safetensors")
    want = {name.replace("icae.", "encoder.", 1): x.view(torch.int16).numpy() for name, x in tensors.items()}
    assert_same({name: x.view(np.int16) for name, x in back.items()}, want)


@pytest.mark.parametrize("held", [{"a": Harmful()}, [1, 2], {"a": {"b": torch.zeros(2)}}, {"a": 3}])
def test_a_bin_file_that_is_more_than_tensors_is_refused(whole, held, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(held, tmp_path / "w.bin")
    said = refusal("inspect", tmp_path / "w.bin")
    assert "cannot be read as a PyTorch file of plain tensors" in said or "flat dictionary of tensors" in said
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("text", [b"", b"\x80\x04]\x94.", b"PK\x03\x04 no archive"])
def test_a_bin_file_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "w.bin").write_bytes(text)
    assert "cannot be read as a PyTorch file of plain tensors" in refusal("inspect", tmp_path / "w.bin")
