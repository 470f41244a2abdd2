"""The complete list of names of vLLM that `netloader/vllm` uses, with the parameters that it passes.

If a use is missing here, `test_every_used_name_is_listed` prints the line to add.
"""

from __future__ import annotations

from dataclasses import dataclass

from netloader.vllm.live.hooks import CAPTURES, CHANGES, DISCARDS, PROFILES, WAKES

OLDEST = "0.23.0"
"""The release that the current vllm-ascend pairs with."""

NEWEST_THAT_RUNS = "0.32.0"
"""The newest release with a CPU build, as in the Makefile."""

NEWEST = "0.33.0"


@dataclass(frozen=True)
class Name:
    """One name.

    Attributes:
        module: Where it is imported from.
        symbol: The name, or "Class.attribute".
        parameters: Those of its parameters that are passed, by name or by place.
        optional: The adapter checks for it and works without it; it may be missing in the oldest release, and has to
            be in the newest.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...] = ()
    optional: bool = False


LATER = ("start_draft_weight_update", "reset_weights", DISCARDS)
"""Methods of a worker that the oldest release does not have."""

OURS = ("BaseModelLoader.get_all_weights",)
"""Methods of our loader that its base class does not have; vLLM looks for them by name."""

NAMES = (
    Name("vllm", "__version__"),
    # --- configuration ---
    Name("vllm.engine.arg_utils", "EngineArgs.create_load_config"),
    Name("vllm.engine.arg_utils", "EngineArgs.distributed_executor_backend"),
    Name("vllm.engine.arg_utils", "EngineArgs.load_format"),
    Name("vllm.engine.arg_utils", "EngineArgs.model_loader_extra_config"),
    Name("vllm.engine.arg_utils", "EngineArgs.nnodes"),
    Name("vllm.config", "get_current_vllm_config"),
    Name("vllm.config", "VllmConfig.additional_config"),
    Name("vllm.config", "VllmConfig.cache_config"),
    Name("vllm.config", "VllmConfig.compilation_config"),
    Name("vllm.config", "VllmConfig.device_config"),
    Name("vllm.config", "VllmConfig"),
    Name("vllm.config", "VllmConfig.get_quantization_config", ("model_config", "load_config")),
    Name("vllm.config", "VllmConfig.load_config"),
    Name("vllm.config", "VllmConfig.offload_config"),
    Name("vllm.config", "VllmConfig.parallel_config"),
    Name("vllm.config", "VllmConfig.speculative_config"),
    Name("vllm.config", "CacheConfig.cache_dtype"),
    Name("vllm.config", "DeviceConfig.device"),
    Name("vllm.config", "LoadConfig.device"),
    Name("vllm.config", "LoadConfig.load_format"),
    Name("vllm.config", "LoadConfig.model_loader_extra_config"),
    Name("vllm.envs", "environment_variables"),
    Name("vllm.config", "ModelConfig._hf_config_revision", optional=True),
    Name("vllm.config", "ModelConfig.architecture"),
    Name("vllm.config", "ModelConfig.config_format"),
    Name("vllm.config", "ModelConfig.dtype"),
    Name("vllm.config", "ModelConfig.hf_config"),
    Name("vllm.config", "ModelConfig.hf_config_path"),
    Name("vllm.config", "ModelConfig.hf_overrides"),
    Name("vllm.config", "ModelConfig.is_moe"),
    Name("vllm.config", "ModelConfig.model"),
    Name("vllm.config", "ModelConfig.model_weights"),
    Name("vllm.config", "ModelConfig.quantization"),
    Name("vllm.config", "ModelConfig.quantization_config"),
    Name("vllm.config", "ModelConfig.revision"),
    Name("vllm.config", "ModelConfig.runner_type"),
    Name("vllm.config", "ModelConfig.served_model_name"),
    Name("vllm.config", "ModelConfig.tokenizer"),
    Name("vllm.config", "ModelConfig.tokenizer_mode"),
    Name("vllm.config", "ModelConfig.tokenizer_revision"),
    Name("vllm.config", "ModelConfig.trust_remote_code"),
    Name("vllm.config", "ModelConfig.word_embeddings_untied_by_checkpoint", optional=True),
    Name("vllm.config", "OffloadConfig.prefetch"),
    Name("vllm.config", "OffloadConfig.uva"),
    Name("vllm.config", "PrefetchOffloadConfig.offload_group_size"),
    Name("vllm.config", "UVAOffloadConfig.cpu_offload_gb"),
    Name("vllm.config", "ParallelConfig.data_parallel_index"),
    Name("vllm.config", "ParallelConfig.data_parallel_rank"),
    Name("vllm.config", "ParallelConfig.data_parallel_size"),
    Name("vllm.config", "ParallelConfig.enable_elastic_ep"),
    Name("vllm.config", "ParallelConfig.enable_eplb"),
    Name("vllm.config", "ParallelConfig.enable_expert_parallel"),
    Name("vllm.config", "ParallelConfig.expert_placement_strategy"),
    Name("vllm.config", "ParallelConfig.prefill_context_parallel_size"),
    Name("vllm.config", "ParallelConfig.worker_cls"),
    Name("vllm.config", "ParallelConfig.world_size"),
    Name("vllm.config", "SpeculativeConfig.draft_model_config"),
    Name("vllm.config", "SpeculativeConfig.target_model_config"),
    Name("vllm.config", "SpeculativeConfig.use_eagle"),
    Name("vllm.model_executor.models.utils", "StageMissingLayer"),
    Name("vllm.tokenizers", "get_tokenizer", ("tokenizer_name", "revision", "trust_remote_code")),
    # --- ranks ---
    Name("vllm.distributed", "get_pcp_group"),
    Name("vllm.distributed", "get_pp_group"),
    Name("vllm.distributed", "get_tp_group"),
    Name("vllm.distributed.parallel_state", "get_pcp_group", optional=True),
    Name("vllm.distributed.parallel_state", "get_pp_group"),
    Name("vllm.distributed.parallel_state", "get_tp_group"),
    Name("vllm.distributed.parallel_state", "GroupCoordinator.cpu_group"),
    Name("vllm.distributed.parallel_state", "GroupCoordinator.rank_in_group"),
    Name("vllm.distributed.parallel_state", "GroupCoordinator.world_size"),
    # --- loading ---
    Name("vllm.model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER"),
    Name("vllm.model_executor.model_loader", "get_model_loader", ("load_config",)),
    Name("vllm.model_executor.model_loader", "register_model_loader", ("load_format",)),
    Name("vllm.model_executor.model_loader.base_loader", "BaseModelLoader", ("load_config",)),
    Name("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_config"),
    Name("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.download_model", ("model_config",)),
    Name(
        "vllm.model_executor.model_loader.base_loader",
        "BaseModelLoader.load_model",
        ("vllm_config", "model_config", "prefix"),
    ),
    Name("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_weights", ("model", "model_config")),
    Name("vllm.model_executor.model_loader.utils", "initialize_model", ("vllm_config", "model_config", "prefix")),
    Name(
        "vllm.model_executor.model_loader.utils",
        "process_weights_after_loading",
        ("model", "model_config", "target_device"),
    ),
    Name("vllm.model_executor.utils", "weights_already_processed", optional=True),
    Name("vllm.model_executor.utils", "replace_parameter", ("layer", "param_name")),
    Name("vllm.model_executor.layers.fused_moe.fused_moe_method_base", "FusedMoEMethodBase"),
    Name("vllm.config", "CompilationConfig.static_forward_context"),
    Name("vllm.config", "CompilationConfig.static_all_moe_layers"),
    # --- reloading ---
    Name(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader.get_all_weights",
        ("model_config", "model"),
    ),
    Name("vllm.model_executor.model_loader.reload.layerwise", "initialize_online_processing", ("layer",)),
    Name("vllm.model_executor.model_loader.reload.utils", "get_layer_tensors", ("layer",)),
    Name("vllm.model_executor.model_loader.weight_utils", "default_weight_loader", ("param", "loaded_weight")),
    # --- what is wrapped, by name: netloader/vllm/live/hooks.py ---
    *(
        Name("vllm.v1.worker.gpu_worker", f"Worker.{name}", optional=name in LATER)
        for name in (*CHANGES, DISCARDS, WAKES, PROFILES, CAPTURES)
    ),
    # --- models ---
    Name("vllm.model_executor.layers.quantization", "get_quantization_config", ("quantization",)),
    *(
        Name(f"vllm.model_executor.layers.{module}", name)
        for module, owner in (
            ("fused_moe.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod"),
            ("linear", "UnquantizedLinearMethod"),
            ("vocab_parallel_embedding", "UnquantizedEmbeddingMethod"),
            ("attention", "Attention"),
        )
        for name in (owner, f"{owner}.process_weights_after_loading")
    ),
    Name("vllm.platforms", "current_platform"),
    Name("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig"),
    Name("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig.get_config_filenames"),
    Name("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig.maybe_update_config"),
    Name("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase"),
    Name(
        "vllm.model_executor.layers.quantization.base_config",
        "QuantizeMethodBase.supports_pre_processed_weights",
        optional=True,
    ),
    Name("vllm.transformers_utils.config", "checkpoint_has_lm_head", ("model", "revision"), optional=True),
)

TEXTS = (
    ("vllm.plugins", "vllm.general_plugins"),
    ("vllm.model_executor.offloader.uva", "_vllm_is_uva_offloaded"),
    ("vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method", "self.unquantized_backend"),
    ("vllm.model_executor.layers.fused_moe.oracle.unquantized", "    TRITON = "),
    ("vllm.model_executor.layers.fused_moe.oracle.unquantized", "    BATCHED_TRITON = "),
)
"""Names that vLLM has as text, or sets on objects that are not its own: a module, and what it has to contain."""

LATER_TEXTS = (("vllm.model_executor.layers.fused_moe.expert_substitution", "expert_substitution_routes"),)
"""Such names that the newest release has, and older ones do not."""

OWNERS = {
    "cache_config": "CacheConfig",
    "device_config": "DeviceConfig",
    "load_config": "LoadConfig",
    "load_config_of_vllm": "LoadConfig",
    "model_config": "ModelConfig",
    "offload": "OffloadConfig",
    "offload_config": "OffloadConfig",
    "parallel": "ParallelConfig",
    "parallel_config": "ParallelConfig",
    "prefetch": "PrefetchOffloadConfig",
    "speculative": "SpeculativeConfig",
    "speculative_config": "SpeculativeConfig",
    "uva": "UVAOffloadConfig",
    "vllm_config": "VllmConfig",
}
"""What the adapter calls vLLM's configurations (a leading underscore aside), and the class of each in `vllm.config`."""
