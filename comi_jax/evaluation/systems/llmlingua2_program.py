"""Compress contexts with LLMLingua-2: a program for the Python of an environment that has the package llmlingua.

    PYTHON llmlingua2_program.py [MODEL] < requests.jsonl > texts.jsonl

See ``llmlingua2`` for the two files. MODEL is a folder or a name of the hub.
"""

import contextlib
import importlib
import json
import sys

MODEL = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"


def main() -> None:
    # This package's own environment lacks both.
    llmlingua, torch = importlib.import_module("llmlingua"), importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.redirect_stdout(sys.stderr):
        model = sys.argv[1] if len(sys.argv) > 1 else MODEL
        compressor = llmlingua.PromptCompressor(model, device_map=device, use_llmlingua2=True)
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            text = compressor.compress_prompt(request["context"], rate=request["keep"])["compressed_prompt"]
        print(json.dumps({"key": request["key"], "text": text}), flush=True)


if __name__ == "__main__":
    main()
