"""The known attributes of a config.json: without effect on the computation, implemented, or with a required value.

An attribute that is not in ``ATTRIBUTES`` might change what a model computes, whatever its value, even ``false``.
Therefore it is refused by name.
"""

from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("llama", "qwen2", "qwen3")
NOTHING, READ, MUST_BE = "computes nothing", "computed here", "must have this value"


@dataclass(frozen=True)
class Attribute:
    """One known attribute. If its ``kind`` is MUST_BE, its value must be one of ``allowed`` in models of the types
    ``of``; in other models it has no effect."""

    kind: str
    reason: str
    allowed: tuple[Any, ...] = ()
    of: tuple[str, ...] = MODEL_TYPES

    def allows(self, value: Any, model_type: object) -> bool:
        return self.kind != MUST_BE or model_type not in self.of or value in self.allowed


OFF = (False, None)

MUST = {
    "hidden_act": (("silu",), "other activations are not implemented", MODEL_TYPES),
    "attention_bias": (OFF, "biases of all four projections", ("llama", "qwen3")),
    "mlp_bias": (OFF, "biases of the feed-forward layer", ("llama",)),
    "attention_dropout": ((0, None), "drops attention weights in training", MODEL_TYPES),
    "use_sliding_window": (OFF, "some layers see the last tokens alone", ("qwen2", "qwen3")),
    "sliding_window": ((None,), "the cache keeps the last tokens alone", ("llama",)),
    "attention_chunk_size": ((None,), "the cache keeps the last tokens alone", MODEL_TYPES),
    "is_causal": ((True,), "false takes the causal mask away", MODEL_TYPES),
    "use_bidirectional_attention": (OFF, "takes the causal mask away", MODEL_TYPES),
    "add_cross_attention": (OFF, "a decoder over another model's states", MODEL_TYPES),
    "is_encoder_decoder": (OFF, "a decoder over another model's states", MODEL_TYPES),
    "partial_rotary_factor": ((1, None), "rotates a part of each head", MODEL_TYPES),
    "rope_interleaved": (OFF, "rotates neighbours instead of halves", MODEL_TYPES),
    "use_mrope": (OFF, "rotates by positions in pictures", MODEL_TYPES),
    "quantization_config": ((None,), "weights are not numbers but codes", MODEL_TYPES),
    "compression_config": ((None,), "weights are not numbers but codes", MODEL_TYPES),
    "attn_logit_softcapping": ((None,), "bounds the scores", MODEL_TYPES),
    "final_logit_softcapping": ((None,), "bounds the logits", MODEL_TYPES),
    "per_layer_config": ((None, {}), "gives layers other shapes", MODEL_TYPES),
    "pruned_heads": ((None, {}), "takes heads out of layers", MODEL_TYPES),
}  # fmt: skip

COMPUTED = (
    ("the shape of the model", """
        model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        head_dim tie_word_embeddings"""),
    ("the normalisation", "rms_norm_eps"),
    ("the rotary embeddings, whose types are checked", "rope_theta rope_scaling rope_parameters"),
    ("how many positions a model was trained on", "max_position_embeddings"),
    ("attention of each layer: full_attention alone", "layer_types"),
    ("which file the weights are in", "transformers_weights"),
)  # fmt: skip

HARMLESS = (
    ("names and versions", """
        architectures is_llama_config transformers_version name_or_path _name_or_path _commit_hash model_name
        custom_pipelines transformers.js_config base_model_tp_plan base_model_pp_plan base_model_ep_plan
        base_model_fsdp_plan"""),
    ("code of its own, which transformers does not run unless told to trust it", "auto_map _auto_class"),
    ("the dtype of the files, which the files say themselves", "dtype torch_dtype use_bfloat16"),
    ("the tokenizer's, or the ids of its tokens", """
        tokenizer_class bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
        bos_token eos_token pad_token unk_token padding_side tokenizer_padding_side model_max_length
        tokenizer_model_max_length chat_template prefix decoder_start_token_id"""),
    ("lengths that nothing is cut at", """
        max_sequence_length max_seq_len max_seq_length seq_length max_length max_window_layers"""),
    ("settings of text generation, which answering has of its own", """
        min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
        temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids force_words_ids
        num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values renormalize_logits
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias constraints guidance_scale
        penalty_alpha low_memory stop_strings max_time token_healing watermarking_config dola_layers generation_config
        assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind num_assistant_tokens
        num_assistant_tokens_schedule max_matching_ngram_size prompt_lookup_num_tokens is_assistant
        cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile
        _from_model_config"""),
    ("what a call returns or keeps", """
        use_cache output_attentions output_hidden_states output_scores output_logits output_past return_dict
        use_return_dict return_dict_in_generate tie_last_hidden_states keys_to_ignore_at_inference num_logits_to_keep
        logits_to_keep is_decoder torchscript"""),
    ("heads for other tasks, which a language model does not have", """
        num_labels id2label label2id problem_type classifier_dropout finetuning_task task_specific_params
        hidden_dropout token_classification_bias"""),
    ("how the same numbers are computed", """
        attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
        _flash_attn_2_enabled use_flash_attn use_flash_attention use_flash_attention_2 experts_implementation
        _experts_implementation _experts_implementation_internal pretraining_tp chunk_size_feed_forward tensor_parallel
        gradient_checkpointing use_reentrant"""),
    ("how a model is initialised or trained", """
        initializer_range initializer_factor init_std neftune_noise_alpha label_smoothing loss_type tf_legacy_loss
        unsloth_fixed unsloth_version"""),
    ("of pairs of models, or of other families", """
        tie_encoder_decoder cross_attention_hidden_size router_aux_loss_coef output_router_logits"""),
)  # fmt: skip

ATTRIBUTES = {
    **{name: Attribute(MUST_BE, reason, allowed, of) for name, (allowed, reason, of) in MUST.items()},
    **{name: Attribute(READ, reason) for reason, names in COMPUTED for name in names.split()},
    **{name: Attribute(NOTHING, reason) for reason, names in HARMLESS for name in names.split()},
}
