"""The main job: a tiny language model becomes a compressor, from generated question answering; no download, no GPU.

    python -m comi_jax.train --config=tiny
"""

from comi_jax.config import Compression, Config, Data, Generation, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(path="tiny", dtype="float32", remat=False),
        compression=Compression(rates=(8,), encoder_layers=2, lsa_layers=1, segment_size=192),
        data=Data(
            train=("synthetic",),
            eval=("synthetic",),
            synthetic_examples=19_200,
            eval_examples=512,
            max_context=192,
            max_query=16,
            max_answer=4,
            buckets=(192,),
        ),
        optimizer=Optimizer(learning_rate=2e-3, schedule="linear", warmup=0.05, weight_decay=0.01, beta2=0.98),
        train=Train(steps=600, batch_size=32, log_every=20, compare_mean_pooling=True),
        generation=Generation(max_new_tokens=4),
    )
