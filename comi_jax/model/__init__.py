"""The paper: from token ids to memory and answers.

    equation                                        file
    (1) MIG, relevance, redundancy                  mig.py; the segment-wise maximum itself: kernels/redundancy.py
    (3) encoder, query vector                       comi.py; the transformer block: backbone.py
    (4)-(6) representatives, shares, group sizes    compress.py; over tokens split over devices: context_parallel.py
    (7), (8) softmax over a group, merging          compress.py; the merge itself: kernels/merge.py
    (9) LSA, decoder, loss                          comi.py; decoding: generate.py

batch.py holds what goes in, architecture.py what the model is made of, lora.py the adapters, attention.py and
attention_blocked.py attention, cache.py keys and values, remat.py what the backward pass computes again, flops.py the
operations counted.
"""
