"""A harder first result: 64 facts in four documents of 700 tokens together, at rates 8 to 32; no download, no GPU.

    python -m comi_jax.train --config=tiny
    python -m comi_jax.train --config=small

Hardware: 2 CPU cores. It starts from the run of the tiny config, as retrieval from long contexts is hardly learnt from
scratch. A rate is drawn for each question. The questions are about one fact; `data.train=synthetic-documents` (and
`data.eval`) makes half of them two-hop.

Expected: em 0.64 to 0.80 in the closing table, much the same at 8x, 16x and 32x, on 512 questions about people that
occur in no training text. Which of these depends on the run of the tiny config that it starts from; longer runs have
not been tried. The second command takes 8 minutes of one core (docs/results.md, with other systems beside it:
`python -m comi_jax.compare --config=small --start-from=DIR`).
"""

from comi_jax.config import Beacon, Compression, Config, Data, Generation, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(path="runs/tiny", made_by="python -m comi_jax.train --config=tiny", dtype="float32", remat="off"),
        # One segment holds all documents, so that tokens can be allocated among them; alpha_fine as in tiny.
        compression=Compression(rates=(8, 16, 32), encoder_layers=2, lsa_layers=1, segment_size=800, alpha_fine=4.0),
        beacon=Beacon(window=64),  # of system=beacon: the published 1,024 would compress nothing
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
        train=Train(steps=600, batch_size=64, share_context=16, log_every=20, checkpoint_every=200),
        generation=Generation(max_new_tokens=4),
    )
