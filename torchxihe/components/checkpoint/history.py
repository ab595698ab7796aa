"""train_state.json: step, data order, config and its changes; which options may change between two starts of a run."""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from torchxihe.components.checkpoint.manifest import (
    TRAIN_STATE,
    checkpoints_of,
    is_committed,
    read_file,
    step_of,
    steps_in,
)
from torchxihe.components.checkpoint.storage import CorruptError, Location, hash_file
from torchxihe.config.options import Config
from torchxihe.data.order import BLOCK
from torchxihe.errors import UserError
from torchxihe.utils.records import DamagedError, Record, parse_record

log = logging.getLogger(__name__)

Kind = Literal["free", "recorded", "refused"]

# Every option, by section. Free: has no influence on the result. Recorded: may change; the checkpoints record when and
# to what. Refused: it would be another experiment, whose losses cannot be compared with the earlier ones.
KINDS: dict[Kind, dict[str, str]] = {
    "free": {
        "run": "name dir",
        "model": "attention mlp",
        "data": "cache_dir remote remote_cache_gib max_epochs",
        "training": "micro_batch_size compile deterministic time_limit init_timeout step_timeout",
        "parallelism": "dp_replicate dp_shard cp cp_method tp pp pp_schedule pp_stages_per_rank "
        "reshard_after_forward activation_checkpointing "
        "activation_budget",
        "checkpoint": "every mode dir load load_only export_every keep_last keep_every keep_best best_by final",
        "metrics": "log_every sample_every sample_prompt sample_tokens tensorboard prometheus wandb wandb_project",
        "profiler": "first_step steps memory",
    },
    "recorded": {
        "model": "initializer_range",
        "tokenizer": "path revision vocab_size train_bytes",  # its content is compared by hash
        "data": "sources loss_roles document_mask on_bad_rows max_bad_rows",
        "validation": "every max_tokens sets",
        "training": "steps tokens global_batch_size batch_ramp dtype max_grad_norm max_skipped skip_spikes_beyond",
        "float8": "recipe scope",
        "optimizer": "lr momentum betas eps weight_decay",
        "lr_scheduler": "name warmup_steps decay_fraction decay_shape min_lr_fraction",
    },
    "refused": {
        "model": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
        " vocab_size qk_norm tie_word_embeddings rope_theta rms_norm_eps",
        "tokenizer": "chat_template",
        "data": "format seq_len packing",  # the data order is a sequence of row numbers, which depend on these
        "validation": "fraction",  # held-out documents would be trained on
        "training": "seed",
        "optimizer": "name state_dtype",
    },
}


class _SavedSection(BaseModel):
    """A section of a saved config: what is read of it, and other options, which may be another version's."""

    model_config = ConfigDict(extra="allow", strict=True)


class _SavedRunSection(_SavedSection):
    dir: str
    name: str


class _SavedData(_SavedSection):
    seq_len: Annotated[int, Field(gt=0, le=2**26)]  # the tables of RoPE have as many rows
    format: str = "text"


class _SavedConfig(BaseModel):
    """The config in a checkpoint. Options are read from it by name only; the rest is compared with today's config."""

    model_config = ConfigDict(extra="allow", strict=True)

    run: _SavedRunSection
    model: dict[str, Any]
    data: _SavedData

    @model_validator(mode="after")
    def _check_sections(self) -> "_SavedConfig":
        for name, section in (self.model_extra or {}).items():
            if not isinstance(section, dict):
                raise ValueError(f"{name} is not a table")
        return self


Count = Annotated[int, Field(ge=0, lt=2**63)]


class _SavedStage(Record):
    """`Stage.to_json`."""

    g: Count
    step: Count
    global_batch: Annotated[int, Field(gt=0, lt=2**63)]
    seed: NonNegativeInt
    sources: tuple[str, ...]
    quotas: tuple[PositiveInt, ...]
    first: tuple[Count, ...]

    @model_validator(mode="after")
    def _check(self) -> "_SavedStage":
        if not len(self.sources) == len(self.quotas) == len(self.first) or sum(self.quotas) != BLOCK:
            raise ValueError("sources, quotas and first do not fit each other")
        return self


class _Change(Record):
    step: Count
    option: str
    was: Annotated[Any, Field(alias="from")]
    to: Any


class _TrainState(Record):
    """Exactly what `History.to_json` returns."""

    step: Count
    stages: tuple[_SavedStage, ...]
    config: _SavedConfig
    changes: tuple[_Change, ...]
    tokenizer: str
    origin: str

    @model_validator(mode="after")
    def _check_stages(self) -> "_TrainState":
        starts = [(stage.g, stage.step) for stage in self.stages]
        if starts and (starts[0] != (0, 0) or not all(a < c and b < d for (a, b), (c, d) in pairwise(starts))):
            raise ValueError("the stages are not in order")
        return self


def read_train_state(directory: Location) -> dict[str, Any]:
    """What `History.to_json` returned when the committed step `directory` was saved.

    Raises CorruptError unless it is exactly that, of this step, with the hash in the manifest; OSError; UserError.
    """
    content = read_file(directory, TRAIN_STATE)
    try:
        state = parse_record(content, _TrainState).model_dump(mode="json", by_alias=True)
    except DamagedError as error:
        raise CorruptError(f"{TRAIN_STATE} is not what a run saves: {error}") from None
    if state["step"] != step_of(directory.name):
        raise CorruptError(f"{TRAIN_STATE} is of step {state['step']}, but the directory is named {directory.name}")
    return state


def kind_of(option: str) -> Kind:
    """The kind of "section.name". Raises KeyError for one that has none."""
    section, _, name = option.partition(".")
    for kind, sections in KINDS.items():
        if name in sections.get(section, "").split():
            return kind
    raise KeyError(option)


def all_changes(before: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The options, but for free ones, whose values differ between `before` (as JSON) and `config`, with both values."""
    now = config.model_dump(mode="json")
    return {
        f"{section}.{name}": (value, now[section][name])
        for section, values in before.items()
        for name, value in values.items()
        # An option that only one of two versions of torchxihe has is not a change.
        if name in now.get(section, {}) and now[section][name] != value and kind_of(f"{section}.{name}") != "free"
    }


def recorded_changes(before: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The options that have changed since a checkpoint with the config `before` (as JSON), with both values.

    Free ones are left out. Raises UserError, a line each, for those that must not change.
    """
    changes = all_changes(before, config)
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
    """A change, one line per difference; lists of tables (a mixture) are compared by the tables' names."""
    entries = [*was, *now] if isinstance(was, list) and isinstance(now, list) else [was]
    if not all(isinstance(entry, dict) for entry in entries):
        return [f"{option} changes from {was} to {now}"]

    def by_name(tables: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        keys = ("path", "subset", "glob")
        return {e.get("name") or " ".join(str(e[key]) for key in keys if e.get(key)): e for e in tables}

    old, new = by_name(was), by_name(now)
    lines = [f"{option}: {name} is removed" for name in old if name not in new]
    lines += [f"{option}: {name} is added" for name in new if name not in old]
    lines += [
        f"{option}: {name}: {key} changes from {old[name][key]} to {value}"
        for name in new
        for key, value in new[name].items()
        if name in old and key in old[name] and value != old[name][key]
    ]
    return lines or [f"{option} changes"]  # the order of tables, or options of another version


def newest_train_state(config: Config) -> dict[str, Any] | None:
    """The train_state of the run's newest checkpoint; None if there is none, or if it is damaged or unreadable.

    That is no error here: training checks it, and may fall back to an older one.
    """
    try:
        newest = next((step for step in steps_in(checkpoints_of(config)) if is_committed(step)), None)
        return read_train_state(newest) if newest else None
    except (CorruptError, OSError):
        return None


def check_changes(config: Config) -> None:
    """Raise UserError for what must not change since the newest checkpoint: before hours of preparing the data."""
    if saved := newest_train_state(config):
        recorded_changes(saved["config"], config)


class History:
    """The part of a checkpoint that is not tensors."""

    def __init__(self, config: Config, tokenizer_dir: Path) -> None:
        """`tokenizer_dir` holds the `tokenizer.json` that the data was prepared with."""
        self._config = config
        self._tokenizer = hash_file(Location(tokenizer_dir / "tokenizer.json"))[1]
        self._changes: list[dict[str, Any]] = []
        self._origin = ""
        self.stages: list[dict[str, Any]] = []
        """The stages of the data order, as JSON."""

    def to_json(self, step: int) -> dict[str, Any]:
        """The content of train_state.json of a checkpoint of `step`."""
        return {
            "step": step,
            "stages": self.stages,
            "config": self._config.model_dump(mode="json"),
            "changes": self._changes,
            "tokenizer": self._tokenizer,
            "origin": self._origin,
        }

    def resume(self, saved: dict[str, Any]) -> None:
        """Resume the run that wrote `saved`. Raises UserError if an option has changed that must not."""
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

    def record_sources(self, change: str, step: int) -> None:
        """Log and record that another content is read from `step` on; the stages have the content keys."""
        log.warning("%s at step %d", change, step)
        self._changes.append({"step": step, "option": "data.sources", "from": "", "to": change})

    def start_from(self, saved: dict[str, Any], origin: Location, full: bool) -> None:
        """Start a new run from the checkpoint `origin`; `full`: with its step and data order, not its weights alone.

        Logs the options that differ from the origin's, free ones excepted. Raises UserError for another tokenizer.
        """
        if saved["tokenizer"] != self._tokenizer:
            raise UserError(
                f"checkpoint.load: {origin} was trained with another tokenizer; "
                "set tokenizer.path to its run's tokenizer/"
            )
        for option, (was, now) in all_changes(saved["config"], self._config).items():
            for line in describe_change(option, was, now):
                log.info("%s, compared with %s", line, origin)
            if full:
                self._changes.append({"step": saved["step"], "option": option, "from": was, "to": now})
        self._origin = str(origin)
        if full:
            self._changes, self.stages = saved["changes"] + self._changes, saved["stages"]
