"""The paper: from token ids to memory and answers.

    equation                                        file
    (1) MIG, relevance, redundancy                  mig.py; the segment-wise maximum itself: kernels/redundancy.py
    (3) encoder, query vector                       encoder.py; the transformer block: backbone.py
    (4)-(6) representatives, shares, group sizes    compress.py; over tokens split over devices: context_parallel.py
    (7), (8) softmax over a group, merging          compress.py; the merge itself: kernels/merge.py
    (9) LSA, decoder, loss, the pipeline            comi.py; decoding: generate.py and slots.py,
                                                    the choice of a token: sampling.py

The rest: batch.py (the input), architecture.py (parts and parameters), lora.py (adapters), attention.py and
attention_blocked.py, cache.py (the KV cache), remat.py (rematerialisation policies), flops.py (FLOP counts).
"""
