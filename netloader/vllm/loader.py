"""The class that vLLM builds for ``--load-format netloader``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from netloader.config import Config, load_config
from netloader.vllm.live.hooks import pause_transfers_until_profiled, wrap_worker
from netloader.vllm.live.reloading import ReloadRefused, record_loaded, was_loaded, weights_for_reload
from netloader.vllm.serve.guard import refuse_on_failure, serving_only

if TYPE_CHECKING:
    import torch

    from netloader.vllm.load.inspect_engine import Context
    from netloader.vllm.load.loading import Loaded

__all__ = ["loader_class"]

log = logging.getLogger(__name__)


@functools.cache
def loader_class() -> type[Any]:
    """The loader class; always the same one. It is defined on the first call, because its base class is vLLM's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class NetloaderModelLoader(BaseModelLoader):
        """Fills a model from a source or with the default loader, and serves it."""

        def __init__(self, load_config_of_vllm: Any) -> None:
            # Only the configuration is read here, because vLLM constructs loaders also when it loads nothing.
            super().__init__(load_config_of_vllm)
            self._config = load_config(load_config_of_vllm.model_loader_extra_config)
            # The state of the running load. `load_weights`, which vLLM calls during `load_model`, replaces it.
            self._phase: Context | Loaded | None = None

        def download_model(self, model_config: Any) -> None:
            from netloader.vllm.model.fallback import fallback_loader

            if self._config.source:
                log.info("netloader: nothing is downloaded ahead, since there is a SOURCE to pull from")
                return
            config = self._config
            loader = fallback_loader(self.load_config, config.fallback_format, config.fallback_config)
            loader.download_model(model_config)

        def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
            from vllm.config import get_current_vllm_config

            return weights_for_reload(get_current_vllm_config(), model_config, self.load_config, self._config, model)

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            from netloader.vllm.load.inspect_engine import Context
            from netloader.vllm.load.loading import load_weights

            if isinstance(self._phase, Context):
                self._phase = load_weights(self._phase, model)
            else:
                _fill_existing(model, model_config, self.load_config, self._config)

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
            from netloader.vllm.load.inspect_engine import Engine, inspect

            self._phase = context = inspect(Engine(vllm_config, model_config, self.load_config), self._config, prefix)
            try:
                with refuse_on_failure(context.server, context.role):
                    wrapped = False
                    with serving_only("wrapping the worker's methods", None):
                        wrapped = wrap_worker(str(vllm_config.parallel_config.worker_cls))
                    with context.reads, context.post_processing:
                        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
                    _finish(self._phase, model, wrapped=wrapped)
            finally:
                self._phase = None
            return model

    return NetloaderModelLoader


def _finish(phase: Context | Loaded, model: torch.nn.Module, *, wrapped: bool) -> None:
    """The end of a load, after vLLM has post-processed the weights.

    Args:
        phase: The state of the load.
        model: The model.
        wrapped: Whether the methods of the worker are wrapped, so that its memory measurement is noticed.
    """
    from netloader.vllm.load.inspect_engine import NothingPulled
    from netloader.vllm.load.loading import Loaded, serve_loaded

    if not isinstance(phase, Loaded):
        raise NothingPulled("vLLM has built a model and not asked for its weights", hint="report vLLM's version to us")
    serve_loaded(phase, model)
    engine = phase.context.engine
    if wrapped and not engine.loads_draft_next:
        with serving_only("pausing transfers until vLLM has measured its memory", None):
            pause_transfers_until_profiled(engine.device)
    record_loaded(model, phase.snapshot.record.announcement, str(engine.model_config.model))


def _fill_existing(model: torch.nn.Module, model_config: Any, load_config_of_vllm: Any, config: Config) -> None:
    """Fill a model that exists already. It is not served, because vLLM does not say when it post-processes it.

    Raises:
        ReloadRefused: This loader has loaded the model before.
    """
    from vllm.config import get_current_vllm_config

    from netloader.vllm.load.inspect_engine import Engine, inspect_built
    from netloader.vllm.load.loading import load_weights

    if was_loaded(model):
        refused = ReloadRefused(
            "load_weights was called for a model that is loaded: vLLM has rewritten its weights since, and raw "
            "ones would be taken for processed ones",
            hint="call reload_weights of the worker instead",
        )
        log.warning("netloader: the weights stay as they are: %s", refused)
        raise refused
    engine = Engine(get_current_vllm_config(), model_config, load_config_of_vllm)
    load_weights(inspect_built(engine, config), model)
