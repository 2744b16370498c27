"""What becomes of the keys that many releases share: of transformers, LLaVA's trainer and peft.

Sources: `huggingface/transformers: configuration_utils.py, generation/configuration_utils.py,
tokenization_utils_base.py, image_processing_utils.py`; `haotian-liu/LLaVA: llava/train/train.py,
llava/model/llava_arch.py`; `huggingface/peft: tuners/lora/config.py`.
"""

from __future__ import annotations

from typing import Any

from hrvlm_jax.checkpoint.settings import USED, Harmless, Keys, Only, Rule


def same(reason: str, *keys: str) -> dict[str, Rule]:
  """Keys that are harmless for one reason."""
  return dict.fromkeys(keys, Harmless(reason))


def used(*keys: str) -> dict[str, Rule]:
  """Keys that are read."""
  return dict.fromkeys(keys, USED)


def _only(value: Any, *keys: str) -> dict[str, Rule]:
  return dict.fromkeys(keys, Only((value,)))


_SAMPLING = 'sampling and beams are asked for by --temperature, --top-k, --top-p, --min-p, --beams'
_LENGTH = 'the length of an answer is asked for by --max-new-tokens'
_OUTPUT = 'only what the original returns beside the answer'
_SPEED = 'only how fast the original is, or how it is saved'
_TRAINER = "only how the original's training was run"

# generation_config.json; older config.json files hold the same keys.
GENERATION: Keys = {
  **used('eos_token_id', 'repetition_penalty', 'no_repeat_ngram_size'),
  **same(_SAMPLING, 'do_sample', 'temperature', 'top_k', 'top_p', 'min_p', 'typical_p',
         'epsilon_cutoff', 'eta_cutoff', 'top_h', 'num_beams', 'num_beam_groups', 'early_stopping',
         'length_penalty', 'diversity_penalty', 'num_return_sequences', 'penalty_alpha'),
  **same(_LENGTH, 'max_length', 'max_new_tokens'),
  **same('the tokenizer and the template name these tokens', 'bos_token_id', 'pad_token_id',
         'decoder_start_token_id', 'sep_token_id'),
  **same(_OUTPUT, 'output_attentions', 'output_hidden_states', 'output_scores', 'output_logits',
         'return_dict_in_generate', 'return_dict'),
  **same(_SPEED, 'use_cache', 'cache_implementation', 'cache_config', 'max_cache_len',
         'transformers_version', '_from_model_config', 'compile_config', 'disable_compile',
         'prefill_chunk_size', 'low_memory', 'is_assistant', 'num_assistant_tokens',
         'num_assistant_tokens_schedule', 'assistant_confidence_threshold',
         'prompt_lookup_num_tokens', 'max_matching_ngram_size', 'assistant_early_exit',
         'assistant_lookbehind', 'target_lookbehind', 'trust_remote_code', '_commit_hash',
         'continuous_batching_config', 'use_mtp', 'speculation_type', 'assistant_ensemble_weight'),
  **_only(0, 'min_length', 'min_new_tokens', 'encoder_no_repeat_ngram_size'),
  **_only(1.0, 'encoder_repetition_penalty', 'guidance_scale'),
  **_only(False, 'renormalize_logits', 'remove_invalid_values', 'token_healing'),
  **dict.fromkeys(('max_time', 'stop_strings', 'bad_words_ids', 'forced_bos_token_id',
                   'forced_eos_token_id', 'exponential_decay_length_penalty', 'suppress_tokens',
                   'begin_suppress_tokens', 'sequence_bias', 'watermarking_config', 'dola_layers',
                   'constraints', 'force_words_ids'), Only((), 'null')),
}

# Keys that every config.json of transformers may have.
GENERIC: Keys = {
  **GENERATION, **used('model_type', 'architectures', 'hrvlm'),
  **same('generation_config.json or the template names the end of an answer', 'eos_token_id'),
  **_only(1.0, 'repetition_penalty'), **_only(0, 'no_repeat_ngram_size'),
  **same('every tensor has its own dtype', 'torch_dtype', 'dtype', 'use_bfloat16', 'fp16', 'bf16'),
  **same('only a name', '_name_or_path', 'name_or_path', 'auto_map', 'tokenizer_class',
         'processor_class', 'finetuning_task', 'task_specific_params', 'prefix', 'problem_type',
         'id2label', 'label2id', 'num_labels', '_num_labels', 'tokenizer_name', 'dataset_version'),
  **same(_SPEED, 'torchscript', 'chunk_size_feed_forward', '_attn_implementation',
         '_attn_implementation_autoset', 'attn_implementation', '_flash_attn_2_enabled',
         'flash_attn', 'flash_rotary', 'fused_dense', 'use_flash_attention_2', 'tf_legacy_loss',
         'is_decoder', 'gradient_checkpointing'),
  **_only(False, 'is_encoder_decoder', 'add_cross_attention', 'tie_encoder_decoder'),
  'pruned_heads': Only(({},)), 'cross_attention_hidden_size': Only((), 'null'),
  'quantization_config': Only((), 'null: weights that are not quantized'),
}

_DROPOUT = 'dropout of the original training; none is applied here'
VISION: Keys = {  # vision_config of CLIP and SigLIP
  **GENERIC,
  **used('image_size', 'patch_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
         'intermediate_size', 'hidden_act', 'layer_norm_eps', 'num_channels'),
  **same(_DROPOUT, 'attention_dropout', 'dropout'),
  **same('only the start of a training', 'initializer_range', 'initializer_factor'),
  **same('contrastive head, which is not read', 'projection_dim'),
  **_only(True, 'vision_use_head'),
}

# config.json of LLaVA and its kin, beside the keys of the language model.
LLAVA: Keys = {
  **used('mm_projector_type', 'mm_vision_select_layer', 'mm_vision_tower', 'image_aspect_ratio',
         'text_type', 'chat'),
  'mm_vision_select_feature': Only(('patch',)),
  **_only(False, 'mm_use_im_start_end'),
  **_only(True, 'use_mm_proj'),
  **same('the shapes of the projector say it', 'mm_hidden_size'),
  **same('adds a token to the vocabulary that no prompt has', 'mm_use_im_patch_token'),
  **same('mm_vision_tower says it', 'vision_tower'),
  **same(_TRAINER, 'tune_mm_mlp_adapter', 'freeze_mm_mlp_adapter', 'tune_mm_vision_resampler',
         'freeze_mm_vision_resampler',
         'unfreeze_mm_vision_tower', 'mm_projector_lr', 'mm_vision_tower_lr',
         'pretrain_mm_mlp_adapter', 'tune_vision_tower', 'tune_language_model', 'tune_mm_projector',
         'delay_load', 'freeze_backbone', 'mm_tunable_parts', 'vision_tower_lr', 'ignore_index',
         'frames_upbound', 'group_by_modality_length'),
  **same('only of the tokenizer in training', 'tokenizer_model_max_length',
         'tokenizer_padding_side', 'max_sequence_length', 'model_max_length'),
  **same('only for image_aspect_ratio anyres', 'image_grid_pinpoints', 'image_crop_resolution',
         'image_split_resolution', 'mm_patch_merge_type'),
  **same('of video alone', 'add_faster_video', 'faster_token_stride', 'force_sample',
         'mm_spatial_pool_mode', 'mm_spatial_pool_stride', 'mm_spatial_pool_out_channels',
         'mm_newline_position', 'add_time_instruction'),
  'mm_resampler_type': Only((), 'null'),
  **_only(False, 's2', 'use_pos_skipping'),
  **same('only with use_pos_skipping', 'pos_skipping_range'),
}

TOKENIZER: Keys = {  # tokenizer_config.json and special_tokens_map.json
  **used('tokenizer_class', 'bos_token', 'eos_token', 'pad_token', 'unk_token', 'add_bos_token',
         'added_tokens_decoder', 'add_prefix_space', 'legacy', 'hf_tokenizer_name'),
  **same('a token of the vocabulary', 'additional_special_tokens', 'extra_special_tokens',
         'sep_token', 'cls_token', 'mask_token', 'image_token', 'boi_token', 'eoi_token',
         'audio_token', 'video_token', 'media_tokens', 'model_specific_special_tokens',
         'boxed_token'),
  **same("the system's own template is used", 'chat_template', 'use_default_system_prompt',
         'default_system_prompt'),
  **same('prompts are cut and padded here', 'model_max_length', 'max_length', 'max_len',
         'padding_side', 'truncation_side', 'padding', 'truncation', 'pad_to_multiple_of',
         'pad_token_type_id', 'stride', 'truncation_strategy', 'model_input_names'),
  **same('only a name, or of the library', 'name_or_path', 'special_tokens_map_file', 'backend',
         'tokenizer_file', 'processor_class', 'auto_map', 'is_local', 'use_fast',
         'local_files_only', '__type', '_commit_hash', 'transformers_version', 'trust_remote_code',
         'device_map', 'torch_dtype', 'merges_file', 'vocab_file', 'add_tokens', 'from_slow',
         'legacy_behaviour'),
  **same('answers are decoded as the tokens say', 'clean_up_tokenization_spaces',
         'spaces_between_special_tokens', 'decode_with_prefix_space'),
  **same('text towers have their own rules', 'do_lower_case'),
  **_only(False, 'add_eos_token', 'split_special_tokens', 'rstrip', 'lstrip'),
  'sp_model_kwargs': Only(({},)), 'errors': Only(('replace', 'strict')),
}

_PICTURE = 'the views are made here; their size, mean and colours are compared'
PREPROCESSOR: Keys = {  # preprocessor_config.json
  **used('image_mean', 'image_std', 'mean', 'std', 'size', 'crop_size', 'image_size'),
  **_only(True, 'do_resize', 'do_rescale', 'do_normalize'),
  'resample': Only((3, 'bicubic')), 'interpolation': Only(('bicubic',)),
  'resize_mode': Only(('squash',)),
  'rescale_factor': Only(lambda v: isinstance(v, float) and abs(v - 1 / 255) < 1e-9, '1/255'),
  **same(_PICTURE, 'do_center_crop', 'do_convert_rgb', 'do_pad', 'crop_pct', 'default_to_square',
         'image_processor_type', 'feature_extractor_type', 'processor_class', 'data_format',
         'input_data_format', '_valid_processor_keys', 'auto_map', 'device', 'disable_grouping',
         'return_tensors', 'pad_size', 'fill_color', 'image_seq_length', 'patch_size',
         'num_channels', 'max_crops', 'num_tokens', 'system', 'encoder', 'token_maps',
         'model_class'),
}

PROCESSOR: Keys = {  # processor_config.json
  **same('the layout says it', 'processor_class', 'image_token', 'patch_size', 'hrvlm', 'auto_map',
         'num_additional_image_tokens', 'image_seq_length', 'image_processor', 'tokenizer',
         'image_token_id', 'split', 'after_image'),
  **same("the system's own template is used", 'chat_template'),
  'vision_feature_select_strategy': Only(('default',)),
}

# adapter_config.json of peft. What changes the sum W + alpha / r * B @ A is refused.
_NO_PART = 'null: nothing of it'
ADAPTER: Keys = {
  **used('peft_type', 'r', 'lora_alpha', 'lora_dropout', 'target_modules', 'bias', 'use_dora',
         'use_rslora', 'fan_in_fan_out', 'rank_pattern', 'alpha_pattern', 'modules_to_save'),
  **same('only a name', 'base_model_name_or_path', 'revision', 'task_type', 'auto_mapping',
         'peft_version', 'inference_mode', 'parent_library'),
  'init_lora_weights': Only((True, False, 'gaussian', 'eva', 'orthogonal'),
                            'a start that leaves the base as it is'),
  **same('of kinds that are refused', 'loftq_config', 'eva_config', 'corda_config', 'megatron_core',
         'qalora_group_size', 'layers_pattern', 'runtime_config', 'velora_config', 'lora_ga_config',
         'monteclora_config', 'bdlora_config'),
  **_only(False, 'lora_bias', 'use_qalora', 'ensure_weight_tying', 'use_bdlora'),
  **{key: Only(([], {}), _NO_PART) for key in (
    'layers_to_transform', 'layer_replication', 'megatron_config', 'trainable_token_indices',
    'target_parameters', 'exclude_modules', 'arrow_config', 'alora_invocation_tokens')},
}
