"""Text encoders as workflows hold them: the `CLIP` object, a tokenizer and an encoder with its patcher."""

from __future__ import annotations

from typing import Any

import torch

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.utils
from comfy import accounting, weight_files
from comfy.text_encoders.configs import model_options_for

StateDict = dict[str, torch.Tensor]


class CLIP:
    """A tokenizer and text encoders. Clones share the networks; patches and options belong to the clone.

    target: has `clip` and `tokenizer` classes and `params` for the former.
    state_dict: the weights that `load_sd` will bring (with full keys, or those of one encoder, or a list of the
        latter); sizes and storage formats are read from them, and networks wait on the meta device, so that weights
        keep their memory-mapped pages.
    model_options: "load_device", "offload_device", "dtype", "<encoder>_class", "<encoder>_model_config", ...
    """

    def __init__(
        self,
        target: Any = None,
        embedding_directory: Any = None,
        no_init: bool = False,
        tokenizer_data: dict[str, Any] | None = None,
        parameters: int = 0,
        model_options: dict[str, Any] | None = None,
        state_dict: StateDict | list[StateDict] | None = None,
    ) -> None:
        if no_init:
            return
        options = dict(model_options or {})
        management = comfy.model_management
        load_device = options.get("load_device", management.text_encoder_device())
        offload_device = options.get("offload_device", management.text_encoder_offload_device())
        dtype = options.get("dtype") or management.text_encoder_dtype(load_device)
        known = model_options_for(state_dict)
        for name in known.keys() & options.keys():
            if name.endswith("_model_config"):  # a pack may give some entries of one
                options[name] = {**known[name], **options[name]}
        options = {**known, **options}
        params = {**target.params, "dtype": dtype, "device": "meta", "model_options": options}
        self.cond_stage_model = target.clip(**params)
        self.tokenizer = target.tokenizer(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})
        self.cond_stage_model.device = torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.cond_stage_model, load_device=load_device, offload_device=offload_device
        )
        # A schedule of prompts alternates rarely: keeping patched copies would only cost memory.
        self.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        self.patcher.is_clip = True
        self.apply_hooks_to_conds: Any = None
        self.layer_idx: int | None = None
        self.use_clip_schedule = False
        self.tokenizer_options: dict[str, Any] = {}

    def clone(self) -> CLIP:
        """Another object with the same networks and its own patches and options."""
        other = CLIP(no_init=True)
        other.patcher = self.patcher.clone()
        other.cond_stage_model = self.cond_stage_model
        other.tokenizer = self.tokenizer
        other.layer_idx = self.layer_idx
        other.tokenizer_options = dict(self.tokenizer_options)
        other.use_clip_schedule = self.use_clip_schedule
        other.apply_hooks_to_conds = self.apply_hooks_to_conds
        return other

    def add_patches(
        self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """See `ModelPatcher.add_patches`."""
        return self.patcher.add_patches(patches, strength_patch, strength_model)

    def set_tokenizer_option(self, option_name: str, value: Any) -> None:
        """Set what `tokenize` passes on as `tokenizer_options`."""
        self.tokenizer_options[option_name] = value

    def clip_layer(self, layer_idx: int | None) -> None:
        """Take hidden states of another layer (negative counts from the end); None is the encoder's default."""
        self.layer_idx = layer_idx

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        """Rows of (id, weight) per encoder: {"l": [[...], ...], "t5xxl": ...}."""
        if self.tokenizer_options:
            kwargs["tokenizer_options"] = {**kwargs.get("tokenizer_options", {}), **self.tokenizer_options}
        return self.tokenizer.tokenize_with_weights(text, return_word_ids, **kwargs)

    def add_hooks_to_dict(self, pooled_dict: dict[str, Any]) -> dict[str, Any]:
        """Put the hooks that conditionings inherit into `pooled_dict`."""
        if self.apply_hooks_to_conds:
            pooled_dict["hooks"] = self.apply_hooks_to_conds
        return pooled_dict

    def _encode(self, tokens: Any, unprojected: bool) -> tuple[Any, ...]:
        model = self.cond_stage_model
        model.reset_clip_options()
        layer = {} if self.layer_idx is None else {"layer": self.layer_idx}
        if unprojected:
            model.set_clip_options({"projected_pooled": False})
        self.load_model()
        # Weights may wait in host memory; the computation belongs on the load device all the same.
        model.set_clip_options({**layer, "execution_device": self.patcher.load_device})
        encoded = model.encode_token_weights(tokens)
        self.patcher.weight_store.check_files()
        return encoded

    @accounting.phase("text")
    def encode_from_tokens(self, tokens: Any, return_pooled: Any = False, return_dict: bool = False) -> Any:
        """Features [1, L, C] of tokens.

        return_pooled: also the pooled vector; "unprojected" for the one before the projection.
        return_dict: {"cond", "pooled_output", ...} with everything that the encoder gives.
        """
        cond, pooled, *more = self._encode(tokens, unprojected=return_pooled == "unprojected")
        if return_dict:
            out = {"cond": cond, "pooled_output": pooled, **(more[0] if more else {})}
            return self.add_hooks_to_dict(out)
        return (cond, pooled) if return_pooled else cond

    @accounting.phase("text")
    def encode(self, text: str) -> torch.Tensor:
        """Features of a text."""
        return self.encode_from_tokens(self.tokenize(text))

    @accounting.phase("text")
    def encode_from_tokens_scheduled(
        self,
        tokens: Any,
        unprojected: bool = False,
        add_dict: dict[str, Any] | None = None,
        show_pbar: bool = True,
    ) -> list[list[Any]]:
        """A conditioning, [[features, fields], ...]: one entry, or one per part of a schedule of weight hooks."""
        return_pooled = "unprojected" if unprojected else True
        hooks = self.patcher.forced_hooks
        if hooks is None or not self.use_clip_schedule:
            fields = self.encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=True)
            return [[fields.pop("cond"), {**fields, **(add_dict or {})}]]
        hooks.reset()
        self.patcher.patch_hooks(None)
        progress = comfy.utils.ProgressBar(0) if show_pbar else None
        schedule = hooks.get_hooks_for_clip_schedule()
        out = []
        for done, ((start, end), active) in enumerate(schedule, start=1):
            for hook, keyframe in active:
                hook.hook_keyframe.select(keyframe)
            self.patcher.patch_hooks(hooks)
            fields = self.encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=True)
            fields.update(add_dict or {})
            fields["clip_start_percent"], fields["clip_end_percent"] = start, end
            out.append([fields.pop("cond"), fields])
            if progress is not None:
                progress.update_absolute(done, len(schedule))
        hooks.reset()
        return out

    def load_sd(self, sd: StateDict, full_model: bool = False) -> tuple[list[str], list[str]]:
        """Take weights; returns (missing keys, unexpected keys).

        full_model: keys name the encoder, "clip_l.transformer.text_model..."; otherwise they are those of one encoder.
        """
        self.patcher.weight_store.loaded_from |= weight_files.files_in(sd)
        if not full_model:
            result = self.cond_stage_model.load_sd(sd)
            return list(result.missing_keys), list(result.unexpected_keys)
        missing: list[str] = []
        unexpected: list[str] = []
        parts: dict[str, StateDict] = {}
        for key, value in sd.items():
            name, dot, rest = key.partition(".")
            if not dot or not hasattr(self.cond_stage_model, name):
                unexpected.append(key)
            elif rest.startswith("transformer."):
                parts.setdefault(name, {})[rest.removeprefix("transformer.")] = value
            elif rest not in ("logit_scale", "spiece_model", "tekken_model"):
                unexpected.append(key)
        for name, part in parts.items():
            result = getattr(self.cond_stage_model, name).load_sd(part)
            missing += [f"{name}.transformer.{key}" for key in result.missing_keys]
            unexpected += [f"{name}.transformer.{key}" for key in result.unexpected_keys]
        return missing, unexpected

    def get_sd(self) -> StateDict:
        """All weights with full keys, and what the tokenizer needs."""
        return {**self.cond_stage_model.state_dict(), **self.tokenizer.state_dict()}

    def load_model(self) -> Any:
        """Bring the encoders to their load device."""
        comfy.model_management.load_model_gpu(self.patcher)
        return self.patcher

    def get_key_patches(self) -> Any:
        """See `ModelPatcher.get_key_patches`."""
        return self.patcher.get_key_patches()
