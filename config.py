"""ModelConfig and TrainConfig: every option of a model and of its training. No torch.

The command line of train.py is generated from these dataclasses, and the comment behind a field is its help text.
"""

import ast
import inspect
import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

VERSION = 2  # of the JSON files; raise it when a field is renamed or changes its meaning, and add a step to `migrate`

# What these fields of TrainConfig may name without a plugin.
NAMES = {
    "loss": ("cross_entropy",), "optimizer": ("AdamW", "Muon"), "schedule": ("linear", "cosine", "wsd", "constant"),
}  # fmt: skip

MAX_SEED = 2**63 - 1  # the largest whole number of 64 bits, which every random number generator takes

IGNORE = -100  # a target that is not scored, such as padding; the default ignore_index of PyTorch's cross_entropy

Layers = str | list[str] | tuple[str | list[str], ...]

PRE_NORM = "Norm->Attn->+->Norm->MLP->+"
SANDWICH_NORM = "Norm->Attn->Norm->+->Norm->MLP->Norm->+"
# The MLP's output is added to the input of the layer, not of the MLP (Ma et al. 2024, arXiv 2404.08801, section 3.4).
TWO_HOP = "SkipOut->Norm->Attn->SkipIn(learned=False)->Norm->MLP->+"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. The vocabulary size belongs to the tokenizer."""

    dim: int = 128  # width of the residual stream
    num_layers: int = 2  # number of layers
    layers: Layers = PRE_NORM  # layer string; a list of strings is parallel branches, a tuple of layers tiles the depth
    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # key and value heads; fewer than num_heads is grouped-query attention, 1 is multi-query
    head_dim: int | None = None  # channels per head; None is dim / num_heads
    max_seq_len: int = 512  # context length in tokens; most stories are shorter
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"  # position encoding
    rope_theta: float = 10_000.0  # base of the RoPE wavelengths; larger for longer contexts
    norm: Literal["RMSNorm", "LayerNorm", "CosineNorm", "DynamicTanh"] = "RMSNorm"  # what `Norm` in the layer string stands for
    norm_affine: bool = True  # norms have a learned gain for each channel
    norm_bias: bool = False  # norms also have a learned bias for each channel
    norm_eps: float = 1e-5  # keeps norms from dividing by zero
    mlp_dim: int | None = None  # hidden width of the MLP; None is 4 x dim, or 8/3 x dim if gated: the same number of parameters
    activation: Literal["SiLU", "GELU", "ReLU", "ReLU2"] = "SiLU"  # activation function of the MLP; GELU by tanh
    gated: bool = True  # gated MLP (SwiGLU, GeGLU)
    linear_bias: bool = False  # biases in the linear layers of attention and MLP
    qk_norm: bool = False  # normalise queries and keys: stable at higher learning rates
    attention_soft_cap: float | None = None  # cap attention scores at +-this with tanh, as in Grok and Gemma 2
    logit_soft_cap: float | None = None  # cap the output logits at +-this with tanh, as in Gemma 2
    logit_scale: float = 1.0  # factor of the output logits, before the cap
    zero_init: bool = False  # initialise the last matrix of each block, and an untied head, with zeros
    tied_embeddings: bool = True  # token embedding and output head share their weights
    embedding_scale: float | Literal["sqrt(dim)"] = 1.0  # factor of the token embeddings
    dropout: float = 0.0  # dropout probability of embeddings, attention weights and residual updates
    model: str = "GPT"  # GPT, or a model of a plugin, with its options: Looped(times=4)
    plugins: tuple[str, ...] = ()  # modules with BLOCKS, MODELS, OPTIMIZERS, SCHEDULES, LOSSES, DATA: experiments.mine.blocks

    def __post_init__(self):
        check_types(self)
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "max_seq_len"):
            require(getattr(self, name) >= 1, self, name, "give a whole number of at least 1")
        for name in ("head_dim", "mlp_dim", "attention_soft_cap", "logit_soft_cap"):
            value = getattr(self, name)
            require(value is None or value > 0, self, name, "give a positive number, or None")
        for name in ("rope_theta", "norm_eps", "logit_scale"):
            require(getattr(self, name) > 0, self, name, "give a positive number")
        scale = self.embedding_scale
        require(scale == "sqrt(dim)" or scale > 0, self, "embedding_scale", "give a positive number, or 'sqrt(dim)'")
        require(0 <= self.dropout < 1, self, "dropout", "give a probability from 0 to below 1")
        require(
            self.num_heads % self.num_kv_heads == 0, self, "num_kv_heads",
            f"it must divide num_heads={self.num_heads}: take one of {divisors(self.num_heads)}",
        )  # fmt: skip
        require(
            self.head_dim is not None or self.dim % self.num_heads == 0, self, "num_heads",
            f"it must divide dim={self.dim}: take one of {divisors(self.dim)}, or set head_dim",
        )  # fmt: skip
        head_dim = self.block_values()["head_dim"]
        require(
            self.positions != "rope" or head_dim % 2 == 0, self, "positions",
            f"RoPE rotates pairs of channels, but head_dim={head_dim} is odd: make it even",
        )  # fmt: skip
        require(
            self.positions != "sinusoidal" or self.dim % 2 == 0, self, "positions",
            f"sines and cosines come in pairs, but dim={self.dim} is odd: make it even",
        )  # fmt: skip
        require(self.norm_affine or not self.norm_bias, self, "norm_bias", "a bias needs norm_affine=True")
        tile = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        require(len(tile) > 0 and [] not in tile, self, "layers", f"name at least one layer, such as {PRE_NORM!r}")
        cure = f"{len(tile)} layers tile the depth: take a multiple of {len(tile)}"
        require(self.num_layers % len(tile) == 0, self, "num_layers", cure)
        for layer in self.layer_strings:
            layer_steps(layer)
        check_name_and_options(self, "model")

    @property
    def depth_layers(self) -> list[str | list[str]]:
        """The layer at each depth, from first to last: the tile, repeated."""
        tile = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        return list(tile) * (self.num_layers // len(tile))

    @property
    def layer_strings(self) -> list[str]:
        """All layer strings, from first to last, those of parallel branches included; then those in brackets."""
        inner = (options["layer"] for branch in self.branch_strings for _, options, _ in all_steps(branch) if "layer" in options)
        return [*self.branch_strings, *inner]

    @property
    def branch_strings(self) -> list[str]:
        """The layer strings from first to last, those of parallel branches included."""
        return [branch for layer in self.depth_layers for branch in ([layer] if isinstance(layer, str) else layer)]

    def block_values(self, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """The values that a block's __init__ may name: its options in the layer string, and the fields of the config.

        A head_dim or mlp_dim of None is replaced by its default.

        >>> ModelConfig(dim=96).block_values({"window": 64})["window"], ModelConfig(dim=96).block_values()["mlp_dim"]
        (64, 256)
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)} | (options or {})
        values["head_dim"] = values["head_dim"] or self.dim // self.num_heads
        values["mlp_dim"] = values["mlp_dim"] or (gated_width(4 * self.dim) if values["gated"] else 4 * self.dim)
        return values


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    data: str = "auto"  # tinystories (auto; offline storyworld_small), storyworld, hub:owner/name, a path, DATA of a plugin
    tokenizer: str = "bpe_tokenizer_1024"  # a name in tokenizers/, a path, hf:name for the Hugging Face hub, or module:Class
    max_stories: int | None = 200_000  # number of training stories to read; None is all
    packing: Literal["packed", "padded"] = "packed"  # several stories per row, or one story per row with padding
    mask_stories: bool = True  # keep tokens from attending to other stories in their row
    batch_size: int = 4  # rows per step; in a short run, small batches learn the most
    batch_size_start: int | None = None  # rows per step at first, doubled up to batch_size by half of the run; None is off
    window_start: int | None = None  # attention window at first, growing to the whole context by half of the run; None is off
    micro_batch_size: int | Literal["auto"] | None = "auto"  # rows per forward pass; None is batch_size, auto is the fastest
    loss_chunk: int | None = 256  # compute the loss in chunks of this many tokens, to save memory and time; None is all at once
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, one more forward pass
    max_steps: int | None = None  # stop after this many steps, or after max_minutes, whichever comes first
    max_minutes: float | None = 3.5  # stop after this many minutes of training, without compiling, evaluating and saving
    eval_every: int = 250  # steps between evaluations on validation stories
    eval_stories: int = 256  # number of whole validation stories per evaluation, always the same ones
    grade_stories: int = 0  # samples per evaluation that storyworld grades; 64 take some seconds
    checkpoint_every: int = 250  # steps between checkpoints
    loss: str = "cross_entropy"  # what training minimises: cross_entropy(label_smoothing=0.0), or a loss of a plugin
    optimizer: str = "AdamW"  # AdamW, Muon (hidden matrices; AdamW does the rest), or one of a plugin: Lion(betas=(0.95, 0.98))
    muon_lr_scale: float = 1.0  # learning rate of Muon relative to that of AdamW
    muon_momentum: float = 0.95  # momentum of Muon; its own option wins
    betas: tuple[float, float] = (0.9, 0.95)  # decay rates of moving averages, in optimizers with betas; their own option wins
    eps: float = 1e-8  # keeps optimizers from dividing by zero; their own option wins
    weight_decay: float = 0.1  # decoupled weight decay of matrices; norms and biases have none
    embedding_decay: float = 0.0  # weight decay of embeddings, tied ones included
    grad_clip: float | None = 1.0  # maximum gradient norm; None does not clip
    ema_decay: float | None = None  # decay of an exponential moving average of the weights, which is evaluated; None is off
    lr_init: float = 0.0  # learning rate before the warm-up
    lr_max: float = 4e-3  # peak learning rate
    lr_min: float = 0.0  # final learning rate
    warmup_steps: int = 50  # steps of linear warm-up from lr_init to lr_max
    final_flat_steps: int = 0  # steps at lr_min at the end
    schedule: str = "linear"  # decay to lr_min: linear, cosine, wsd(decay=0.2) in the last fifth, constant, or one of a plugin
    num_restarts: int = 0  # warm restarts of the schedule
    restart_mult: float = 1.0  # length of each cycle relative to the previous one (T_mult in SGDR)
    seed: int = 0  # random seed of the first weights, the order of the data, and dropout
    data_seed: int | None = None  # random seed of the order of the data; None is seed
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto is the best available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto is the faster one
    fast: bool | Literal["auto"] = "auto"  # use the C++ kernels on a CPU; auto does if that is faster
    compile: bool | Literal["auto"] = "auto"  # use torch.compile; auto tries it for runs of 13 minutes or more
    threads: int | Literal["auto"] = "auto"  # number of CPU threads; auto is the fastest

    def __post_init__(self):
        check_types(self)
        for name in ("batch_size", "eval_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, self, name, "give a whole number of at least 1")
        cure = f"give a whole number from 0 to {MAX_SEED}"
        require(0 <= self.seed <= MAX_SEED, self, "seed", cure)
        require(self.data_seed is None or 0 <= self.data_seed <= MAX_SEED, self, "data_seed", f"{cure}, or None")
        for name in (
            "grade_stories", "warmup_steps", "final_flat_steps", "num_restarts", "weight_decay", "embedding_decay", "lr_init",
            "lr_min",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, self, name, "give a number of at least 0")
        for name in ("max_stories", "max_steps", "max_minutes", "grad_clip", "loss_chunk", "window_start"):
            value = getattr(self, name)
            require(value is None or value > 0, self, name, "give a positive number, or None")
        for name in ("lr_max", "eps", "restart_mult", "muon_lr_scale"):
            require(getattr(self, name) > 0, self, name, "give a positive number")
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "give two numbers from 0 to below 1")
        require(0 <= self.muon_momentum < 1, self, "muon_momentum", "give a number from 0 to below 1")
        require(self.eval_stories >= 200, self, "eval_stories", "give at least 200, as fewer cannot tell models apart")
        world = stories_of(self.data).split(":")[0]
        require(
            self.grade_stories == 0 or world in ("storyworld", "storyworld_small"), self, "grade_stories",
            f"only storyworld can grade stories, and not data={self.data!r}: give data='storyworld', or 0",
        )  # fmt: skip
        require(self.max_steps or self.max_minutes, self, "max_steps", "give max_steps or max_minutes")
        require(self.threads == "auto" or self.threads >= 1, self, "threads", "give a whole number of at least 1, or auto")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, self, "ema_decay", "give a number between 0 and 1, or None")
        for name in ("batch_size_start", "micro_batch_size"):
            cure = f"it must divide batch_size={self.batch_size}: take one of {divisors(self.batch_size)}"
            require(getattr(self, name) in (None, "auto", *divisors(self.batch_size)), self, name, cure)
        for name in NAMES:
            check_name_and_options(self, name)
        require(
            name_and_options(self.schedule)[0] != "constant" or self.final_flat_steps == 0, self, "final_flat_steps",
            "the constant schedule never reaches lr_min: take another schedule, or 0",
        )  # fmt: skip
        for name in ("lr_init", "lr_min"):
            require(getattr(self, name) <= self.lr_max, self, name, f"it may not exceed lr_max={self.lr_max}")
        before_decay = self.warmup_steps + self.final_flat_steps
        require(
            self.max_steps is None or before_decay <= self.max_steps, self, "max_steps",
            f"warmup_steps and final_flat_steps alone take {before_decay}: lower them or raise max_steps",
        )  # fmt: skip

    def progress(self, step: int, seconds: float) -> float:
        """The fraction of max_steps or max_minutes that is used up, whichever is larger: 1 or more at the end."""
        steps = step / self.max_steps if self.max_steps else 0.0
        minutes = seconds / 60 / self.max_minutes if self.max_minutes else 0.0
        return max(steps, minutes)


class StepError(ValueError):
    """A mistake in a step of a layer string; `marked` is the layer string with this step in »«."""

    def __init__(self, layer: str, marked: str, problem: str):
        super().__init__(f"layers={marked!r}: {problem}")
        self.layer, self.marked, self.problem = layer, marked, problem

    def __reduce__(self):  # by default, only the message would be pickled
        return StepError, (self.layer, self.marked, self.problem)


def layer_steps(layer: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse a layer string into (name, options) of each step. A layer in brackets is the option "layer".

    >>> layer_steps("Norm->Attn(window=64)->+")
    [('Norm', {}), ('Attn', {'window': 64}), ('+', {})]
    >>> layer_steps("2 x [Norm->MLP->+]->StochasticDepth([Attn->+], keep=0.5)")
    [('Repeat', {'layer': 'Norm->MLP->+', 'times': 2}), ('StochasticDepth', {'layer': 'Attn->+', 'keep': 0.5})]

    Raises StepError, with the step marked, for anything but `Name`, `Name(option=literal)`, `Name([layer], option=literal)`,
    `N x [layer]`, `|`, and `+` after a block.
    """
    steps: list[tuple[str, dict[str, Any]]] = []
    for position, text in enumerate(split_steps(layer)):
        with marking(layer, position):
            if text == "+" and (not steps or steps[-1][0] in ("+", "|")):
                raise ValueError("this + has nothing to add. Put a block in front of it")
            steps.append((text, {}) if text in ("+", "|") else read_step(text))
    if not any(name not in ("+", "|") for name, _ in steps):
        raise StepError(layer, f"»{layer}«", f"it has no block. Write for example {PRE_NORM!r}")
    return steps


def split_steps(layer: str) -> list[str]:
    """Split a layer string at each -> that is not in square brackets.

    >>> split_steps("Norm -> 3 x [Norm->MLP->+]->+")
    ['Norm', '3 x [Norm->MLP->+]', '+']
    """
    steps: list[str] = []
    for text in layer.split("->"):
        if steps and steps[-1].count("[") > steps[-1].count("]"):
            steps[-1] += "->" + text
        else:
            steps.append(text)
    return [step.strip() for step in steps]


def read_step(text: str) -> tuple[str, dict[str, Any]]:
    """Parse a block of a layer string into its name and options. Raises ValueError if it cannot be read."""
    if text.count("[") != text.count("]"):
        raise ValueError(f"the brackets of {text!r} do not match: close each [ with a ]")
    head, inner, tail = split_brackets(text)
    if times := re.fullmatch(r"(\d+) *x *", head):
        call = f"Repeat(layer={inner!r}, times={int(times[1])}){tail}"
    else:
        call = f"{head}layer={inner!r}{tail}" if re.fullmatch(r"\w+\( *", head) else text
    try:
        name, options = name_and_options(call)
    except ValueError as error:
        fault = f"the step {text!r} cannot be read" if text else "an empty step"
        cure = "Write Name, Name(option=value), Name([layer]), 3 x [layer], + or |, joined by ->"
        raise ValueError(f"{fault}. {cure}") from error
    if call == text and "layer" in options:
        raise ValueError(f"a layer stands in brackets: write {name}([Norm->MLP->+])")
    if "layer" in options:
        layer_steps(inner)
    return name, options


def split_brackets(text: str) -> tuple[str, str, str]:
    """Split a step into what is before, inside and after its first pair of square brackets.

    >>> split_brackets("StochasticDepth([Norm->2 x [MLP]->+], keep=0.5)")
    ('StochasticDepth(', 'Norm->2 x [MLP]->+', ', keep=0.5)')
    """
    head, _, rest = text.partition("[")
    pieces = rest.split("]")
    for number in range(1, len(pieces)):
        inner = "]".join(pieces[:number])
        if inner.count("[") == inner.count("]"):
            return head, inner.strip(), "]".join(pieces[number:])
    return text, "", ""


@contextmanager
def marking(layer: str, position: int):
    """Raise a ValueError inside as a StepError that marks the step at this position, or what is wrong in its brackets."""
    try:
        yield
    except ValueError as error:
        steps, problem = split_steps(layer), str(error)
        head, inner, tail = split_brackets(steps[position])
        if isinstance(error, StepError) and error.layer == inner:
            steps[position], problem = f"{head}[{error.marked}]{tail}", error.problem
        else:
            steps[position] = f"»{steps[position]}«"
        raise StepError(layer, "->".join(steps), problem) from error


def all_steps(layer: str, times: int = 1) -> list[tuple[str, dict[str, Any], int]]:
    """The name and options of each step, those in brackets included, and how often it runs, which a repeat multiplies.

    >>> [(name, times) for name, _, times in all_steps("Norm->2 x [Attn->3 x [MLP]]")]
    [('Norm', 1), ('Repeat', 1), ('Attn', 2), ('Repeat', 2), ('MLP', 6)]
    """
    steps = []
    for name, options in layer_steps(layer):
        steps.append((name, options, times))
        if "layer" in options:
            steps += all_steps(options["layer"], times * options.get("times", 1))
    return steps


def name_and_options(text: str) -> tuple[str, dict[str, Any]]:
    """Parse `Name` or `Name(option=literal)`: how a config names anything with options. Raises ValueError for anything else.

    >>> name_and_options("Looped(times=4)")
    ('Looped', {'times': 4})
    """
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        options = {option.arg: ast.literal_eval(option.value) for option in call.keywords}
        if not isinstance(call.func, ast.Name) or call.args or None in options or len(options) < len(call.keywords):
            raise SyntaxError
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} cannot be read: write Name or Name(option=value)") from error
    return call.func.id, options


def stories_of(data: str) -> str:
    """The source of the stories in TrainConfig.data, without the DATA plugins around it.

    >>> stories_of("SpanCorruption(data='storyworld:200', rate=0.15)"), stories_of("storyworld:200")
    ('storyworld:200', 'storyworld:200')
    """
    try:
        _, options = name_and_options(data)
    except ValueError:  # a path or a name of the hub
        return data
    return stories_of(options["data"]) if isinstance(options.get("data"), str) else data


def format_step(name: str, options: dict[str, Any]) -> str:
    """Write a step as in a layer string.

    >>> format_step("Attn", {"window": 64}), format_step("Repeat", {"layer": "MLP", "times": 2})
    ('Attn(window=64)', '2 x [MLP]')
    """
    if name == "Repeat" and options.keys() == {"layer", "times"}:
        return f"{options['times']} x [{options['layer']}]"
    arguments = [f"[{value}]" if option == "layer" else f"{option}={value!r}" for option, value in options.items()]
    return f"{name}({', '.join(arguments)})" if arguments else name


def to_json(config: ModelConfig | TrainConfig) -> str:
    """Write a config as JSON, one field per line. A tuple of layers becomes {"tile": [...]}, to tell it from a list."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(values.get("layers"), tuple):
        values["layers"] = {"tile": list(values["layers"])}
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in {"version": VERSION, **values}.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(config_class, text: str):
    """Read the JSON of `to_json`, or of an older version. Raises ValueError that names what is broken, unknown or missing."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("this JSON is not a config: it must be an object with a key for every field")
    values = migrate(config_class, values)
    defaults = {field.name: field.default for field in fields(config_class)}
    for name in values:
        if name not in defaults:
            raise ValueError(f"{config_class.__name__} has no field {name!r}.{did_you_mean(name, defaults)}")
    for name, default in defaults.items():
        if name not in values:
            line = f"{json.dumps(name)}: {json.dumps(default)},"
            raise ValueError(f"the field {name!r} of {config_class.__name__} is missing. To an older file, add {line}")
    match values.get("layers"):
        case {"tile": [*tile], **others} if not others:
            values["layers"] = tuple(tile)
    for name in ("betas", "plugins"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return config_class(**values)


def migrate(config_class, values: dict[str, Any]) -> dict[str, Any]:
    """Convert the values of a config file of any version to the current fields. Raises ValueError for a newer version."""
    values = dict(values)
    version = values.pop("version", 1)
    if version not in (1, VERSION):
        raise ValueError(f"version={version!r}: this file was written by a newer baseGPT; this one reads up to version {VERSION}")
    if version == 1 and config_class is ModelConfig:
        values.pop("attention", None)  # the backend, now TrainConfig.fast
        if values.keys() >= {"layers", "mlp_dim", "gated"}:
            values["layers"] = with_real_widths(values["layers"], values["mlp_dim"], values["gated"])
            if values["mlp_dim"] and values["gated"]:
                values["mlp_dim"] = gated_width(values["mlp_dim"])
    if version == 1 and config_class is TrainConfig:
        if "weight_averaging" in values:
            values["ema_decay"] = values.pop("weight_averaging")
        values.setdefault("fast", TrainConfig.fast)
    if config_class is TrainConfig:
        values.setdefault("loss", TrainConfig.loss)  # newer than the version; older files mean the default
    return values


def with_real_widths(layers, mlp_dim: int | None, gated: bool):
    """Convert the layers of version 1, where a gated MLP was only 2/3 as wide as its mlp_dim.

    A step with an option mlp_dim gets the real width, and so does a step whose option gated differs from the config.
    """
    if isinstance(layers, dict):
        return {name: with_real_widths(tile, mlp_dim, gated) for name, tile in layers.items()}
    if isinstance(layers, list):
        return [with_real_widths(layer, mlp_dim, gated) for layer in layers]
    if not isinstance(layers, str) or not {"mlp_dim", "gated"} & {option for _, step in layer_steps(layers) for option in step}:
        return layers
    steps = []
    for name, options in layer_steps(layers):
        is_gated = options.get("gated", gated)
        width = options.get("mlp_dim", mlp_dim if is_gated != gated else None)
        if width is not None:
            options["mlp_dim"] = gated_width(width) if is_gated else width
        steps.append(format_step(name, options))
    return "->".join(steps)


def look_up(kind: str, name: str, table: dict[str, Any]) -> Any:
    """Return table[name]. For an unknown name, raise ValueError with the nearest match and all names."""
    if name not in table:
        raise ValueError(f"no {kind} is called {name!r}.{did_you_mean(name, table)} There are: {', '.join(table)}")
    return table[name]


def did_you_mean(name: str, names) -> str:
    """The sentence " Did you mean ...?", or "" if no name is close.

    >>> did_you_mean("Atn", ["Attn", "MLP"])
    " Did you mean 'Attn'?"
    """
    close = get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_name_and_options(config, name: str):
    """Raise ValueError if a field is not `Name` or `Name(option=literal)`."""
    try:
        name_and_options(getattr(config, name))
    except ValueError as error:
        raise ValueError(f"{name}={error}") from error


def require(condition: Any, config: ModelConfig | TrainConfig, name: str, cure: str):
    if not condition:
        raise ValueError(f"{name}={getattr(config, name)!r}: {cure}")


def check_types(config: ModelConfig | TrainConfig):
    """Raise ValueError for a value that does not match its annotation, which dataclasses do not check."""
    for name, annotation in get_type_hints(type(config)).items():
        value = getattr(config, name)
        require(not isinstance(value, float) or math.isfinite(value), config, name, "give a finite number")
        try:
            is_switch = annotation is bool or bool in get_args(annotation)
            if isinstance(value, bool) and not is_switch:  # to Python, True is also the int 1
                raise TypeCheckError("a bool is not a number")
            check_type(value, annotation, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            choices = get_args(annotation) if get_origin(annotation) is Literal else ()
            expected = annotation.__name__ if isinstance(annotation, type) else annotation
            expected = f"one of {', '.join(choices)}" if choices else expected
            raise ValueError(f"{name}={value!r}: it must be {expected}.{did_you_mean(str(value), choices)}") from error


def init_parameters(block: type) -> dict[str, inspect.Parameter]:
    """The parameters of a block's __init__, and those of its base classes if it passes on **kwargs."""
    return method_parameters(block, "__init__")


def method_parameters(block: type, method: str) -> dict[str, inspect.Parameter]:
    """The parameters of a method, and those of the base classes if it passes on **kwargs."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in block.__mro__:
        if method in vars(base):
            _, *own = inspect.signature(vars(base)[method]).parameters.values()
            stars = {parameter.kind for parameter in own} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
            parameters = {parameter.name: parameter for parameter in own if parameter.kind not in stars} | parameters
            if inspect.Parameter.VAR_KEYWORD not in stars:
                break
    return parameters


def gated_width(mlp_dim: int) -> int:
    """Width of a gated MLP with the parameters of an ungated one of width mlp_dim, to the nearest multiple of 8."""
    return max(8, round(mlp_dim * 2 / 3 / 8) * 8)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
