"""A harder first result: 64 facts in four documents of 700 tokens together, at rates 8 to 32; no download, no GPU.

python -m comi_jax.train --config=small
"""

from comi_jax.config import Compression, Config, Data, Generation, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(path="tiny", dtype="float32", remat="off"),
        # One segment holds all documents, so that tokens can be allocated among them; alpha_fine as in tiny.
        compression=Compression(rates=(8, 16, 32), encoder_layers=2, lsa_layers=1, segment_size=800, alpha_fine=4.0),
        data=Data(
            train=("synthetic-documents:two_hop=0",),
            eval=("synthetic-documents:two_hop=0",),
            synthetic_examples=38_400,
            eval_examples=512,
            max_context=800,
            max_query=24,
            max_answer=4,
            buckets=(800,),
        ),
        optimizer=Optimizer(learning_rate=2e-3, schedule="linear", warmup=0.05, weight_decay=0.01, beta2=0.98),
        train=Train(steps=600, batch_size=64, share_context=16, log_every=20, checkpoint_every=150),
        generation=Generation(max_new_tokens=4),
    )
