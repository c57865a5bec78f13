r"""COMI around LLaMA-2-7B, the paper's settings (section 5.1).

    hf download meta-llama/Llama-2-7b-chat-hf --local-dir=models/llama2
    python -m comi_jax.prepare --config=llama2 model.path=models/llama2 --output=mixture data.eval=DEV.jsonl.gz \
        data.train=NQ.jsonl.gz,HOTPOTQA.jsonl,2WIKIMQA.jsonl,NARRATIVEQA.jsonl,MULTINEWS.jsonl
    python -m comi_jax.train --config=llama2 model.path=models/llama2 data.train=mixture data.eval=mixture

Hardware in the paper: 8 GPUs. This project has not run it at full size; docs/measurements.md lists what was run. The
paper draws each example's rate from 16 and 32, uses contexts of up to 32K tokens, and trains the whole encoder and LSA
and the decoder's W_Q, W_K, W_V, W_O, with learning rate 1e-5, batch size 64 and linear decay. To train with LoRA as the
release does: lora.rank=128 lora.alpha=32 optimizer.schedule=cosine.
"""

from comi_jax.config import Compression, Config, Data, Mesh, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(hub="meta-llama/Llama-2-7b-chat-hf"),
        compression=Compression(rates=(16, 32), encoder_layers=8, lsa_layers=1, segment_size=3_584),
        data=Data(examples_per_source=20_000, max_context=32_256, max_query=512, max_answer=512, on_long="truncate"),
        optimizer=Optimizer(learning_rate=1e-5, schedule="linear", warmup=0.1, weight_decay=0.01, accumulate=0),
        mesh=Mesh(data=1, fsdp=0),  # weights and contexts are split over all devices
        train=Train(steps=1_563, batch_size=64, log_every=10, checkpoint_every=100),
    )
