"""What a run has been through, which every checkpoint carries; what may change between two starts, and what may not."""

import json
import logging
from pathlib import Path
from typing import Any, Literal

from torchxihe.components.checkpoint.manifest import (
    TRAIN_STATE,
    CorruptError,
    checkpoints_of,
    is_committed,
    read_manifest,
    steps_in,
)
from torchxihe.components.checkpoint.storage import Location, hash_file
from torchxihe.config.options import Config
from torchxihe.errors import UserError

log = logging.getLogger(__name__)

Kind = Literal["free", "recorded", "refused"]

# Every option, by section. Free: changes how a run is made, not what it is. Recorded: may change, and the checkpoints
# tell when and to what. Refused: it would be another run, whose losses cannot be compared with what came before.
KINDS: dict[Kind, dict[str, str]] = {
    "free": {
        "run": "name dir",
        "model": "attention mlp",
        "data": "cache_dir max_epochs",
        "training": "micro_batch_size compile deterministic time_limit init_timeout step_timeout",
        "parallelism": "dp_replicate dp_shard reshard_after_forward activation_checkpointing activation_budget",
        "checkpoint": "every mode dir load load_only export_every keep_last keep_every keep_best final",
        "metrics": "log_every sample_every sample_prompt sample_tokens tensorboard wandb wandb_project",
        "profiler": "first_step steps memory",
    },
    "recorded": {
        "model": "initializer_range",
        "tokenizer": "path revision vocab_size train_bytes",  # where it is from: that it is the same is checked
        "data": "sources document_mask on_bad_rows max_bad_rows",
        "validation": "every max_tokens sets",
        "training": "steps tokens global_batch_size batch_ramp dtype max_grad_norm max_skipped skip_spikes_beyond",
        "float8": "recipe",
        "optimizer": "lr momentum betas eps weight_decay",
        "lr_scheduler": "name warmup_steps decay_fraction decay_shape min_lr_fraction",
    },
    "refused": {
        "model": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
        " vocab_size qk_norm tie_word_embeddings rope_theta rms_norm_eps",
        "tokenizer": "chat_template",
        "data": "format seq_len packing",  # they number the rows, and resuming goes by row numbers
        "validation": "fraction",  # what was held out would be trained on
        "training": "seed",
        "optimizer": "name state_dtype",
    },
}


def kind_of(option: str) -> Kind:
    """The kind of "section.name". Raises KeyError for one that has none."""
    section, _, name = option.partition(".")
    for kind, sections in KINDS.items():
        if name in sections.get(section, "").split():
            return kind
    raise KeyError(option)


def recorded_changes(before: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The options that have changed since a checkpoint with the config `before` (as JSON), with both values.

    Free ones are left out. Raises UserError, a line each, for those that must not change.
    """
    now = config.model_dump(mode="json")
    changes = {
        f"{section}.{name}": (value, now[section][name])
        for section, values in before.items()
        for name, value in values.items()
        # An option that came or went with another version of torchxihe is no change of the user's.
        if name in now.get(section, {}) and now[section][name] != value
    }
    remedy = "start another run with --run.name=NAME"
    refused = [
        f"{option}: was {was!r} when this run was saved, is {is_now!r}; a run keeps it: {remedy}"
        for option, (was, is_now) in changes.items()
        if kind_of(option) == "refused"
    ]
    if refused:
        raise UserError("\n".join(refused))
    return {option: values for option, values in changes.items() if kind_of(option) == "recorded"}


def describe_change(option: str, was: Any, now: Any) -> list[str]:
    """A change in lines: of a list of tables (a mixture) only what differs, by the tables' names."""
    entries = [*was, *now] if isinstance(was, list) and isinstance(now, list) else [was]
    if not all(isinstance(entry, dict) for entry in entries):
        return [f"{option} changes from {was} to {now}"]

    def by_name(tables: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        keys = ("path", "subset", "glob")
        return {e["name"] or " ".join(e[key] for key in keys if e.get(key)): e for e in tables}

    old, new = by_name(was), by_name(now)
    lines = [f"{option}: {name} is gone" for name in old if name not in new]
    lines += [f"{option}: {name} is new" for name in new if name not in old]
    lines += [
        f"{option}: {name}: {key} changes from {old[name][key]} to {value}"
        for name in new
        for key, value in new[name].items()
        if name in old and key in old[name] and value != old[name][key]
    ]
    return lines or [f"{option} changes"]  # their order, or options of another version


def check_changes(config: Config) -> None:
    """Raise UserError for what must not change since the run's newest checkpoint: before hours of preparing its data.

    What is damaged or out of reach is training's to judge, which may take an older one.
    """
    try:
        newest = next((step for step in steps_in(checkpoints_of(config)) if is_committed(step)), None)
        if newest and hash_file(newest / TRAIN_STATE) == read_manifest(newest).files[TRAIN_STATE]:
            recorded_changes(json.loads((newest / TRAIN_STATE).read())["config"], config)
    except (CorruptError, OSError):
        return


class History:
    """The part of a checkpoint that is no tensor."""

    def __init__(self, config: Config, tokenizer_dir: Path) -> None:
        """`tokenizer_dir` holds the `tokenizer.json` that the data was prepared with."""
        self._config = config
        self._tokenizer = hash_file(Location(tokenizer_dir / "tokenizer.json"))[1]
        self._changes: list[dict[str, Any]] = []
        self._origin = ""
        self.stages: list[dict[str, Any]] = []
        """The data order's, as JSON."""

    def to_json(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` says of the run."""
        return {
            "step": step,
            "stages": self.stages,
            "config": self._config.model_dump(mode="json"),
            "changes": self._changes,
            "tokenizer": self._tokenizer,
            "origin": self._origin,
        }

    def resume(self, saved: dict[str, Any]) -> None:
        """Continue the run that wrote `saved`. Raises UserError if a change since then makes it another run."""
        changes = recorded_changes(saved["config"], self._config)
        if saved["tokenizer"] != self._tokenizer:
            raise UserError(
                "tokenizer: it is not the one that this run was saved with (one trained on data.sources changes "
                "with them); set tokenizer.path to the run's tokenizer/, or start another run with --run.name=NAME"
            )
        for option, (was, now) in changes.items():
            for line in describe_change(option, was, now):
                log.info("%s at step %d", line, saved["step"])
            self._changes.append({"step": saved["step"], "option": option, "from": was, "to": now})
        self._changes = saved["changes"] + self._changes
        self._origin, self.stages = saved["origin"], saved["stages"]

    def start_from(self, saved: dict[str, Any], origin: Location, whole: bool) -> None:
        """Begin a new run at the checkpoint `origin`; `whole`: with its step and data order, not its weights alone."""
        if saved["tokenizer"] != self._tokenizer:
            raise UserError(
                f"checkpoint.load: {origin} was trained with another tokenizer; "
                "set tokenizer.path to its run's tokenizer/"
            )
        self._origin = str(origin)
        self.stages = saved["stages"] if whole else []
