"""The parser of every command: for its arguments, its `--help` and the shells' completion.

In a file of their own because the commands import torch, and none of these three needs it: printing help needs nothing
but the standard library.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from torchxihe.utils.arguments import Arguments


def parse(command: str, args: list[str]) -> Namespace:
    """The arguments of a command. Raises UserError."""
    parser = PARSERS[command]()
    if parser.takes_overrides:
        # Imports pydantic, which need not be installed where `run_train.sh --help` runs.
        from torchxihe.config.load import join_values

        args = join_values(args)
    return parser.parse(args)


def completion() -> Arguments:
    """Completion of the shell."""
    parser = Arguments(
        "completion",
        """Print a script that completes commands, options, config files and config keys in a shell.

For torchxihe and run_train.sh; needs shtab (pip install shtab). In ~/.bashrc, or in ~/.zshrc after compinit:

  eval "$(torchxihe completion bash)"
  eval "$(torchxihe completion zsh)"

Completing does not start Python.""",
        "torchxihe completion bash",
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    return parser


def config() -> Arguments:
    """Print a config."""
    parser = Arguments(
        "config",
        """Print a config as a run would see it, or write the reference of all options.

The config is printed resolved: what it extends, the overrides and the defaults in one TOML file, which can be run
directly. If it has mistakes, they are printed instead, one per line.""",
        "torchxihe config configs/xihe_debug.toml --training.steps=10",
    )
    parser.add_config(required=False)
    parser.add_argument("--docs", action="store_true", help="write docs/config.md from the docstrings of the options")
    return parser


def data() -> Arguments:
    """Show the data."""
    parser = Arguments(
        "data",
        """Show the prepared data of a config, and rows as the model will see them.

One line per source: documents, tokens, rows to train on and held out, its share of the mixture, and how many epochs of
it the run reads. Run `torchxihe prepare CONFIG` first.""",
        "torchxihe data configs/xihe_debug.toml --rows 2",
    )
    parser.add_config()
    text = "also show the first N rows of training, decoded; tokens without loss are in ⟦brackets⟧"
    parser.add_argument("--rows", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--first", type=int, default=0, metavar="G", help="with --rows: begin at sample G")
    return parser


def doctor() -> Arguments:
    """Check the kernels of this machine."""
    parser = Arguments(
        "doctor",
        """Compare every kernel that a config would use on this machine with its reference, and time both.

For each operation of the model: the largest relative error of output and gradients against the reference in float32,
beside that of the reference in the run's dtype; milliseconds of forward and backward of both; a verdict. Says also why
faster kernels are not used. The exit code is 1 if a kernel is wrong here.""",
        "torchxihe doctor configs/xihe_debug.toml",
    )
    parser.add_config()
    return parser


def evaluate() -> Arguments:
    """Measure a checkpoint."""
    parser = Arguments(
        "eval",
        """Measure a checkpoint: loss, perplexity and bits per byte of held-out documents, or lm-eval's tasks.

Runs in one process, on a GPU if there is one. Training logs the same loss as validation/loss, but on only
validation.max_tokens tokens. An export has no data of its own: name some with --on.""",
        "torchxihe eval runs/xihe_debug",
        "torchxihe eval runs/xihe_120m --tasks hellaswag,arc_easy",
    )
    parser.add_model()
    text = """measure on the held-out documents of this config instead of the run's own; prepare it with the run's
    tokenizer (torchxihe prepare CONFIG --tokenizer.path=RUN/tokenizer) and repeat the overrides here"""
    parser.add_argument("--on", metavar="CONFIG", default="", help=text)
    text = "tokens of all sources together, and of each validation set; default 0: all held-out tokens"
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help=text)
    text = """tasks of lm-eval (pip install 'lm-eval[hf]'; lm_eval ls tasks lists them), through a temporary export in
    $TMPDIR, as large as the model"""
    parser.add_argument("--tasks", default="", metavar="NAME,...", help=text)
    parser.add_argument("--include", default="", metavar="DIR", help="directory of your own tasks (YAML files)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="at most N documents per task")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_overrides()
    return parser


def export() -> Arguments:
    """Write a Hugging Face folder."""
    parser = Arguments(
        "export",
        """Write a run's model as a Hugging Face folder, for AutoModelForCausalLM and AutoTokenizer.

Whatever number of processes wrote the checkpoint, it needs no GPU, and memory for only one tensor. DIR must not exist;
it gets

  model.safetensors                       split into several files with an index above --shard-gb
  config.json  generation_config.json     Llama, or Qwen3 if the run has model.qk_norm
  tokenizer.json  tokenizer_config.json   and chat_template.jinja, if the tokenizer has one
  README.md                               a model card that describes the run""",
        "torchxihe export runs/xihe_debug --out exported/xihe_debug",
    )
    parser.add_model()
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the folder to create")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    text = "maximum gigabytes per file, default 4"
    parser.add_argument("--shard-gb", type=float, default=4.0, metavar="GB", help=text)
    return parser


def generate() -> Arguments:
    """Continue a text."""
    parser = Arguments(
        "generate",
        """Continue a text with a run's model, or answer in its chat format.

Generation stops at the end of the document or of the answer, or after --max-tokens.""",
        'torchxihe generate runs/xihe_debug --prompt "import " --stream',
        'torchxihe generate runs/xihe_debug --prompt "def main" --temperature 0',
        "torchxihe generate runs/xihe_debug_sft --chat",
    )
    parser.add_model()
    text = """text to continue; "" begins a document. Without it, every line of standard input is a prompt, until
    Ctrl-D"""
    parser.add_argument("--prompt", metavar="TEXT", help=text)
    text = """the text is your message, and the model answers in its chat format (docs/sft.md); the lines of standard
    input form one conversation"""
    parser.add_argument("--chat", action="store_true", help=text)
    text = "print tokens as they are generated; always on for prompts from standard input"
    parser.add_argument("--stream", action="store_true", help=text)
    text = "maximum number of tokens, default 200"
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help=text)
    text = "default 0.8; 0 always takes the most likely token"
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help=text)
    text = "sample from the K most likely tokens, default 50; 0: all"
    parser.add_argument("--top-k", type=int, default=50, metavar="K", help=text)
    text = "sample from the most likely tokens of this total probability, default 0.95"
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help=text)
    text = "the same seed generates the same text, default 0"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    return parser


def import_() -> Arguments:
    """Import a Hugging Face model."""
    parser = Arguments(
        "import",
        """Convert a Hugging Face model (Llama or Qwen3) to a checkpoint, to continue training from.

The model comes from a folder, or from the hub (HF_TOKEN in the environment or in .env is used for gated ones). Its
weights, in one or several safetensors files, become float32, one tensor in memory at a time. What the decoder does not
support (scaled rotary embeddings, biases, sliding windows, ...) is refused by name. DIR must not exist; it gets

  checkpoints/step-00000000   the weights
  tokenizer/
  model.toml                  the model, its tokenizer and checkpoint.load: begin a config with
                              extends = "DIR/model.toml" and add [data] and [training]""",
        "torchxihe import exported/xihe_debug --out imported/xihe_debug",
    )
    parser.add_argument("source", metavar="DIR_OR_HUB_ID")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the folder to create")
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub model")
    return parser


def launch() -> Arguments:
    """Prepare and train."""
    parser = Arguments(
        "launch",
        """Prepare the data and train on every GPU of this machine, or of several (run_train.sh runs this).

A run that was interrupted resumes from its newest valid checkpoint. One process per GPU is started, or a single one
without a GPU. Environment variables change that:

  NGPU           processes on this machine
  NNODES         number of machines; start the same command on each of them. 2:4: elastic, with 2 to 4 of them
  NODE_RANK      number of this machine, from 0 (if unset, the numbers are assigned automatically)
  RDZV_ENDPOINT  host:port of machine 0, at which the machines find each other
  RDZV_ID        name of the run there, if several share a store

torchrun's own variables (PET_NPROC_PER_NODE, PET_NNODES, ..., MASTER_ADDR, MASTER_PORT) work, too. Several machines are
described in docs/cluster.md.

SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on to the training processes. The exit code is 0 if all of them succeed,
which includes a run that saved a checkpoint on such a signal.""",
        "torchxihe launch configs/xihe_debug.toml",
        "NGPU=2 torchxihe launch configs/xihe_debug.toml --run.name=two --training.steps=10",
    )
    parser.add_config()
    return parser


def plan() -> Arguments:
    """Plan a run."""
    parser = Arguments(
        "plan",
        """Predict memory, speed and cost of a config on any number of GPUs, and rank the layouts that fit.

Needs no GPU and takes seconds. It prints the peak memory per GPU and the time of a step by part, first of the config as
it is, then of the fastest settings of every layout (dp_replicate × dp_shard × cp × tp, activation checkpointing,
micro-batch, resharding), each with what limits it and as flags for run_train.sh.""",
        'torchxihe plan configs/llama_8b.toml --gpus 64 --gpu "H100 80GB" --price 2.5',
        "torchxihe plan configs/xihe_120m.toml --memory 24",
    )
    parser.add_config()
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="default: as many as this machine has, or 1")
    text = 'words of the GPU\'s name, such as "H100 80GB" or "4090"; default: this machine\'s, else an H100 of 80 GB'
    parser.add_argument("--gpu", default="", metavar="NAME", help=text)
    text = "its memory, if that is not the GPU's own"
    parser.add_argument("--memory", type=float, default=0.0, metavar="GIB", help=text)
    text = "dollars per GPU and hour, for the cost of the run"
    parser.add_argument("--price", type=float, default=0.0, metavar="DOLLARS", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def merge() -> Arguments:
    """Average checkpoints."""
    parser = Arguments(
        "merge",
        """Average the weights of checkpoints, such as the last ones of a run.

They must have one architecture and one tokenizer. Every element of the result is the sum of weight × value in the
order of the arguments, divided by the sum of the weights, all in float64 and rounded to float32 at the end. One tensor
of each model is in memory at a time. DIR must not exist; it gets

  checkpoints/step-N   the weights; N is the largest step of the models
  tokenizer/
  model.toml           for training from it: see torchxihe import --help

DIR is named like a run in eval, generate, export, and in --checkpoint.load with --checkpoint.load_only='["model"]'.""",
        "torchxihe merge runs/xihe_debug/checkpoints/step-00000100 runs/xihe_debug --out runs/merged --weights 1,3",
    )
    text = "runs (their newest checkpoints), step directories or exports"
    parser.add_argument("models", metavar="MODEL", nargs="+", help=text)
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the folder to create")
    parser.add_argument("--weights", default="", metavar="W,W,...", help="of each model, default: equal ones")
    return parser


def plot() -> Arguments:
    """Draw curves."""
    parser = Arguments(
        "plot",
        """Draw the curves of one run, or of several in the same panels, as a PNG.

Panels for loss, bits per byte, learning rate, gradient norm, tokens per second and memory, and for the loss of every
source and validation set if there are several; validation is dashed. Needs matplotlib (pip install matplotlib).""",
        "torchxihe plot runs/xihe_debug --out runs/xihe_debug/plot.png",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run directory")
    text = """the image (.png, .svg or .pdf), default plot.png; an existing file is replaced only if this command has
    written it"""
    parser.add_argument("--out", type=Path, default=Path("plot.png"), metavar="FILE", help=text)
    text = "horizontal axis: steps (default), tokens, or hours of training since the first step"
    parser.add_argument("--by", choices=("step", "tokens", "time"), default="step", help=text)
    text = """draw exponential moving averages over N log steps of the training curves (but not of learning rate and
    memory), default 1: as logged"""
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help=text)
    return parser


def prepare() -> Arguments:
    """Tokenise and pack."""
    parser = Arguments(
        "prepare",
        """Tokenise and pack the data of a config: everything that training with it reads.

What is already prepared is not prepared again, and an interrupted preparation is resumed.""",
        "torchxihe prepare configs/xihe_debug.toml",
        "torchxihe prepare configs/xihe_debug.toml --shard 0/4",
    )
    parser.add_config()
    text = """only part I (from 0) of N, on one of N machines that share data.cache_dir; when all parts are done, run it
    once without --shard"""
    parser.add_argument("--shard", metavar="I/N", default="", help=text)
    text = "prepare in data.cache_dir and copy the result to data.remote, from which any machine can then train"
    parser.add_argument("--upload", action="store_true", help=text)
    return parser


def presets() -> Arguments:
    """List presets."""
    return Arguments(
        "presets",
        """List the presets: configs that come with torchxihe, and are named without a path from any directory.

A preset is trained as it is, changed by --section.key=value, or extended by a config of your own
(extends = "xihe_120m"). torchxihe config NAME prints one with everything that it extends.""",
        "torchxihe presets",
    )


def status() -> Arguments:
    """Show how a run is doing."""
    parser = Arguments(
        "status",
        """Show how a run is doing: step, rate, hosts, last checkpoint, goodput, and what went wrong.

Reads the run directory only, so that it works for a run on other machines, and for one that has ended. Goodput is the
share of the time since the first start that was spent in steps that count: it leaves out compiling, validating, saving,
being stopped, and steps that were repeated after an interruption.""",
        "torchxihe status runs/xihe_debug",
        "torchxihe status runs/xihe_debug --json",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def report() -> Arguments:
    """Write a report."""
    parser = Arguments(
        "report",
        """Write the report of a run as one HTML file: config, data, curves, speed, samples, validation, incidents.

Incidents are skipped steps, restarts, changed options, warnings, errors and corrupt checkpoints. Everything is read
from the run directory, of a run that trains, too. The file needs no network and no other file.""",
        "torchxihe report runs/xihe_debug --out runs/xihe_debug/report.html",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    text = "the file, default report.html; an existing file is replaced only if this command has written it"
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help=text)
    return parser


def serve() -> Arguments:
    """Serve the page."""
    parser = Arguments(
        "serve",
        """Serve a page to watch runs, also while they train, and to talk to their checkpoints and to exports.

What is found below the given directories is shown; nothing else can be read. The page is for this machine, unless
--host says otherwise: then a token is needed, which is part of the address that is printed. Traffic is not encrypted.
See docs/serve.md. Needs starlette and uvicorn (pip install 'torchxihe[serve]').""",
        "torchxihe serve runs exported",
    )
    text = "directories with runs, checkpoints and exports, default runs"
    parser.add_argument("directories", metavar="DIR", nargs="*", type=Path, help=text)
    text = "address to listen at, default 127.0.0.1; 0.0.0.0: all of this machine's"
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help=text)
    parser.add_argument("--port", type=int, default=8765, metavar="PORT", help="default 8765; 0: any free one")
    text = "what requests must know; default: none at 127.0.0.1, else a new random one"
    parser.add_argument("--token", default="", metavar="TOKEN", help=text)
    return parser


def train() -> Arguments:
    """Train."""
    parser = Arguments(
        "train",
        """Train a prepared run: the command that every process executes, usually under torchrun.

Resumes from the run's newest valid checkpoint, if it has one. run_train.sh (torchxihe launch) prepares the data and
starts one of these per GPU; with your own launcher, run torchxihe prepare CONFIG once before it.""",
        "torchxihe train configs/xihe_debug.toml",
        "torchrun --nproc-per-node=2 -m torchxihe train configs/xihe_debug.toml",
    )
    parser.add_config()
    return parser


def verify() -> Arguments:
    """Verify checkpoints or prepared data."""
    parser = Arguments(
        "verify",
        """Read every file of a run's checkpoints, or of prepared data, and print which are valid. Changes nothing.

One line per checkpoint, newest first:

  valid        committed, and every file has the content that was written
  CORRUPT      committed, but a file is damaged or missing (or an earlier start has marked it): it is never loaded
  unfinished   a save that was interrupted; the next start of the run removes it

The exit code is 0 if the newest committed checkpoint is valid, else 1. For prepared data, one line per damaged file is
printed, and the exit code is 0 if there is none.""",
        "torchxihe verify runs/xihe_debug",
        "torchxihe verify configs/xihe_debug.toml",
    )
    text = """a run directory, a checkpoints directory (both also as an fsspec URL) or a single step directory; a config
    (a .toml file, with its overrides), whose prepared data are verified; or a cache of prepared data"""
    parser.add_argument("path", metavar="PATH", help=text)
    parser.add_overrides()
    return parser


PARSERS: dict[str, Callable[[], Arguments]] = {
    "presets": presets,
    "config": config,
    "doctor": doctor,
    "plan": plan,
    "prepare": prepare,
    "data": data,
    "launch": launch,
    "train": train,
    "status": status,
    "plot": plot,
    "report": report,
    "serve": serve,
    "verify": verify,
    "generate": generate,
    "eval": evaluate,
    "merge": merge,
    "export": export,
    "import": import_,
    "completion": completion,
}
"""In the order of work: choose, prepare, train, watch, use, convert."""
