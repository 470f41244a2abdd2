"""The class that vLLM builds for ``--load-format netloader``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from netloader.config import load_config
from netloader.vllm.live.hooks import hold_still_until_profiled, watch_worker
from netloader.vllm.live.reloading import ReloadRefused, remember, was_processed, weights_for_reload
from netloader.vllm.serve.guard import serving_only

if TYPE_CHECKING:
    import torch

    from netloader.vllm.load.loading import Load

__all__ = ["loader_class"]

log = logging.getLogger(__name__)


@functools.cache
def loader_class() -> type[Any]:
    """The loader class; always the same one. Made on demand, since its base class is vLLM's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class NetloaderModelLoader(BaseModelLoader):
        """Fills a model from a neighbour that holds its weights, or as the default loader does, and serves it."""

        def __init__(self, load_config_of_vllm: Any) -> None:
            # vLLM builds loaders more often than it loads: reading the configuration is all that happens here.
            super().__init__(load_config_of_vllm)
            self._config = load_config(load_config_of_vllm.model_loader_extra_config)
            self._current: Load | None = None

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
            load = self._current
            if load is None and was_processed(model):
                refused = ReloadRefused(
                    "load_weights was called for a model that is loaded: vLLM has rewritten its weights since, and raw "
                    "ones would be taken for processed ones",
                    hint="call reload_weights of the worker instead",
                )
                log.warning("netloader: the weights stay as they are: %s", refused)
                raise refused
            if load is None:
                # Called by itself, for a model that is there already: nobody says when post-processing is over.
                from vllm.config import get_current_vllm_config

                load = self._new_load(get_current_vllm_config(), model_config)
            load.fill(model)

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
            load = self._current = self._new_load(vllm_config, model_config)
            try:
                load.prepare(prefix)
                watched = watch_worker(str(vllm_config.parallel_config.worker_cls))
                with load.building, load.post_processing:  # weights that were pulled processed are left alone by vLLM
                    model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
                load.settle(model)
                if watched and load.is_last:  # nothing more is loaded: vLLM measures its memory next
                    with serving_only("holding transfers still until vLLM has measured its memory", None):
                        hold_still_until_profiled(load.device)
                remember(model, load.announcement, str(model_config.model))
            except BaseException as error:
                load.abandon(error)
                raise
            finally:
                self._current = None
            return model

        def _new_load(self, vllm_config: Any, model_config: Any) -> Load:
            from netloader.vllm.load.loading import Load

            return Load(vllm_config, model_config, self.load_config, self._config)

    return NetloaderModelLoader
