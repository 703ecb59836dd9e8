"""Every knob of a model and of its training; presets.py names some settings of them. Nothing here needs torch.

The command line of train.py is generated from these dataclasses, and the comment behind a field is its help text.
"""

import ast
import inspect
import json
import math
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

VERSION = 2  # of the JSON files; raised when a field changes its name or its meaning, with a step in `migrate`

Layers = str | list[str] | tuple[str | list[str], ...]

PRE_NORM = "Norm->Attn->+->Norm->MLP->+"
SANDWICH_NORM = "Norm->Attn->Norm->+->Norm->MLP->Norm->+"
PERI_NORM = SANDWICH_NORM  # with "Norm->|->" before the first layer, which norms the embeddings (arXiv 2502.02732, section 3)
POST_NORM = "Attn->+->Norm->|->MLP->+->Norm"
# For two layers: the first half of a deeper model repeats the first of them, the second half the second.
U_NET = (f"{PRE_NORM}->SkipOut", f"SkipIn->|->{PRE_NORM}")
# The MLP adds to the layer's input, not to what attention has made of it (Ma et al. 2024, arXiv 2404.08801, section 3.4).
TWO_HOP = "SkipOut->Norm->Attn->SkipIn(learned=False)->Norm->MLP->+"
HYPER_CONNECTIONS = "HyperRead->Norm->Attn->HyperWrite->HyperRead->Norm->MLP->HyperWrite"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. The size of the vocabulary is the tokenizer's, so it is not in here."""

    dim: int = 128  # width of the residual stream
    num_layers: int = 2  # depth: how many layers are stacked
    layers: Layers = PRE_NORM  # the layer string; a list of strings runs side by side, a tuple of layers tiles the depth
    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # key and value heads; fewer than num_heads is grouped-query attention, 1 is multi-query
    head_dim: int | None = None  # width of a head; None is dim / num_heads
    max_seq_len: int = 512  # the context: how many tokens the model reads at once; most stories have fewer
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"  # how the model knows where a token stands
    rope_theta: float = 10_000.0  # base of RoPE's wavelengths; more for longer contexts
    norm: Literal["RMSNorm", "LayerNorm", "CosineNorm", "DynamicTanh"] = "RMSNorm"  # what `Norm` in the layer string stands for
    norm_affine: bool = True  # norms learn a gain for each channel
    norm_bias: bool = False  # norms learn a shift for each channel, too
    norm_eps: float = 1e-5  # keeps norms from dividing by zero
    mlp_dim: int | None = None  # hidden width of the MLP; None is 4 x dim, or 8/3 x dim if gated: the same number of parameters
    activation: Literal["SiLU", "GELU", "ReLU", "ReLU2"] = "SiLU"  # non-linearity of the MLP; GELU is the tanh form
    gated: bool = True  # multiply the hidden layer with a second one (SwiGLU, GeGLU)
    linear_bias: bool = False  # attention and MLP matrices add a bias
    qk_norm: bool = False  # normalise queries and keys: steadier at high learning rates
    attention_soft_cap: float | None = None  # squash attention scores into +-cap with tanh, as in Grok and Gemma 2
    logit_soft_cap: float | None = None  # squash the output logits into +-cap with tanh
    logit_scale: float = 1.0  # output logits are multiplied by this, before they are capped
    zero_init: bool = False  # blocks add nothing at first: the last matrix of each, and an untied head, begin at zero
    tied_embeddings: bool = True  # the output head is the token embedding, transposed
    embedding_scale: float | Literal["sqrt(dim)"] = 1.0  # embeddings are multiplied by this on their way in
    dropout: float = 0.0  # share of embeddings, attention weights and residual updates dropped in training
    model: str = "GPT"  # a whole model of its own may come from the MODELS of a plugin, and takes of this config what it wants
    plugins: tuple[str, ...] = ()  # modules whose BLOCKS join the menu of the layer string, e.g. experiments.mine.blocks

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
        require(0 <= self.dropout < 1, self, "dropout", "give a share from 0 to below 1")
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
            f"RoPE turns pairs of channels, but a head has {head_dim}: make head_dim even",
        )  # fmt: skip
        require(
            self.positions != "sinusoidal" or self.dim % 2 == 0, self, "positions",
            f"every sine has its cosine, but dim={self.dim} is odd: make it even",
        )  # fmt: skip
        require(self.norm_affine or not self.norm_bias, self, "norm_bias", "a shift needs norm_affine=True")
        tile = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        require(len(tile) > 0 and [] not in tile, self, "layers", f"name at least one layer, such as {PRE_NORM!r}")
        require(
            self.num_layers % len(tile) == 0, self, "num_layers",
            f"{len(tile)} layers tile the depth: take a multiple of {len(tile)}",
        )  # fmt: skip
        for layer in self.layer_strings:
            layer_steps(layer)

    @property
    def depth_layers(self) -> list[str | list[str]]:
        """The layer at every depth, num_layers of them: the tile repeated."""
        tile = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        return list(tile) * (self.num_layers // len(tile))

    @property
    def layer_strings(self) -> list[str]:
        """Every layer string, parallel ones included, from the first layer to the last."""
        return [branch for layer in self.depth_layers for branch in ([layer] if isinstance(layer, str) else layer)]

    def block_values(self, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a block may ask for by name: the options of the layer string, else the fields; head_dim and mlp_dim worked out.

        By default a gated MLP is 8/3 dim wide, to the nearest multiple of 8: with its third matrix it has as many parameters as
        an ungated one of 4 dim.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)} | (options or {})
        values["head_dim"] = values["head_dim"] or self.dim // self.num_heads
        values["mlp_dim"] = values["mlp_dim"] or (gated_width(4 * self.dim) if values["gated"] else 4 * self.dim)
        return values


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    data: str = "auto"  # tinystories, storyworld, hub:owner/name, a file or a folder; auto is tinystories, or storyworld offline
    tokenizer: str = "bpe_tokenizer_1024"  # a name in tokenizers/, a path, or hf:name for one from Hugging Face
    max_stories: int | None = 200_000  # read only so many training stories of the source; None is all
    packing: Literal["packed", "padded"] = "packed"  # several stories a row, or one a row and padding behind it
    mask_stories: bool = True  # keep a story from attending to its neighbours in the row
    batch_size: int = 4  # sequences a step; small ones learn most in little time
    batch_size_start: int | None = None  # sequences a step at first, doubled up to batch_size by half of the run; None is off
    window_start: int | None = None  # how far back a token may look at first; grows to all by half of the run; None is off
    micro_batch_size: int | Literal["auto"] | None = "auto"  # sequences that go through the model at once; None is batch_size
    loss_chunk: int | None = 256  # tokens whose logits exist at once; None is all, which takes more memory and time
    gradient_checkpointing: bool = False  # keep less of the way forward and compute it again: less memory, a third more time
    max_steps: int | None = None  # stop after so many steps, or after max_minutes, whichever comes first
    max_minutes: float | None = 3.5  # stop after so many minutes of training, evaluations included but for the last one
    eval_every: int = 250  # steps between two looks at the validation stories
    eval_stories: int = 256  # how many whole validation stories are scored, always the same ones
    grade_stories: int = 0  # on storyworld, how many samples the world grades at each of these looks; 64 take some seconds
    checkpoint_every: int = 250  # steps between two checkpoints
    optimizer: Literal["AdamW", "Muon"] = "AdamW"  # Muon is for the hidden matrices; AdamW does the rest
    muon_lr_scale: float = 1.0  # Muon's learning rate is so many times that of AdamW
    muon_momentum: float = 0.95  # Muon's memory of gradients: the share it keeps a step
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's memory of gradients and of their squares
    eps: float = 1e-8  # AdamW's guard against dividing by zero
    weight_decay: float = 0.1  # pull of matrices towards zero, as a share of the learning rate; none on norms and biases
    embedding_decay: float = 0.0  # the same pull of embeddings, tied ones too
    grad_clip: float | None = 1.0  # longest gradient; None does not clip
    ema_decay: float | None = None  # decay of an exponential moving average of the weights, the one that is kept; None is off
    lr_init: float = 0.0  # learning rate before the warm-up
    lr_max: float = 4e-3  # learning rate after it
    lr_min: float = 0.0  # learning rate at the end
    warmup_steps: int = 50  # steps from lr_init to lr_max
    final_flat_steps: int = 0  # steps at lr_min at the very end
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "linear"  # to lr_min; wsd in the last fifth, constant never
    num_restarts: int = 0  # how often the schedule jumps back to lr_max
    restart_mult: float = 1.0  # each cycle is so much longer than the one before
    seed: int = 0  # decides the first weights, the order of the data and dropout
    data_seed: int | None = None  # decides the order of the data instead; None is seed
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto is the best there is
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto is what the machine is faster at
    fast: bool | Literal["auto"] = "auto"  # C++ versions of the blocks, on a CPU; auto is what is faster
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto tries it in runs of 13 minutes or more
    threads: int | Literal["auto"] = "auto"  # of the CPU; auto is what is fastest

    def __post_init__(self):
        check_types(self)
        for name in ("batch_size", "eval_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, self, name, "give a whole number of at least 1")
        require(self.data_seed is None or self.data_seed >= 0, self, "data_seed", "give a number of at least 0, or None")
        for name in (
            "grade_stories", "warmup_steps", "final_flat_steps", "num_restarts", "weight_decay", "embedding_decay", "lr_init",
            "lr_min", "seed",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, self, name, "give a number of at least 0")
        for name in ("max_stories", "max_steps", "max_minutes", "grad_clip", "loss_chunk", "window_start"):
            value = getattr(self, name)
            require(value is None or value > 0, self, name, "give a positive number, or None")
        for name in ("lr_max", "eps", "restart_mult", "muon_lr_scale"):
            require(getattr(self, name) > 0, self, name, "give a positive number")
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "give two numbers from 0 to below 1")
        require(0 <= self.muon_momentum < 1, self, "muon_momentum", "give a share from 0 to below 1")
        require(self.eval_stories >= 200, self, "eval_stories", "fewer than 200 cannot tell models apart")
        require(
            self.grade_stories == 0 or self.data.split(":")[0] == "storyworld", self, "grade_stories",
            f"only storyworld can grade stories, and not data={self.data!r}: give data='storyworld', or 0",
        )  # fmt: skip
        require(self.max_steps or self.max_minutes, self, "max_steps", "give max_steps or max_minutes, or it never ends")
        require(self.threads == "auto" or self.threads >= 1, self, "threads", "give a whole number of at least 1, or auto")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, self, "ema_decay", "give a number between 0 and 1, or None")
        start = self.batch_size_start
        require(
            start is None or (1 <= start <= self.batch_size and (self.batch_size / start).is_integer()), self, "batch_size_start",
            f"it must divide batch_size={self.batch_size}: take one of {divisors(self.batch_size)}",
        )  # fmt: skip
        micro = self.micro_batch_size
        require(
            micro in (None, "auto") or (micro >= 1 and self.batch_size % micro == 0), self, "micro_batch_size",
            f"it must divide batch_size={self.batch_size}: take one of {divisors(self.batch_size)}",
        )  # fmt: skip
        require(
            self.schedule != "constant" or self.final_flat_steps == 0, self, "final_flat_steps",
            "the constant schedule never comes down: take another schedule, or 0",
        )  # fmt: skip
        for name in ("lr_init", "lr_min"):
            require(getattr(self, name) <= self.lr_max, self, name, f"it may not exceed lr_max={self.lr_max}")
        before_decay = self.warmup_steps + self.final_flat_steps
        require(
            self.max_steps is None or before_decay <= self.max_steps, self, "max_steps",
            f"warmup_steps and final_flat_steps alone take {before_decay}: lower them or raise max_steps",
        )  # fmt: skip

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget that is used up, in steps or in minutes, whichever is nearer its end: 1 or more at the end."""
        steps = step / self.max_steps if self.max_steps else 0.0
        minutes = seconds / 60 / self.max_minutes if self.max_minutes else 0.0
        return max(steps, minutes)


def layer_steps(layer: str) -> list[tuple[str, dict[str, Any]]]:
    """'Norm->Attn(window=64)->+'  becomes  [('Norm', {}), ('Attn', {'window': 64}), ('+', {})]

    Raises ValueError that marks the step which is not `Name`, `Name(option=literal)`, `+` or `|`, or a + with nothing to add.
    """
    steps = []
    for place, text in enumerate(step.strip() for step in layer.split("->")):
        if text == "+" and (not steps or steps[-1][0] in ("+", "|")):
            raise ValueError(f"layers={marked(layer, place)!r}: this + has nothing to add. Put a block in front of it")
        if text in ("+", "|"):
            steps.append((text, {}))
            continue
        try:
            node = ast.parse(text, mode="eval").body
            call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
            options = {option.arg: ast.literal_eval(option.value) for option in call.keywords}
            if not isinstance(call.func, ast.Name) or call.args or None in options or len(options) < len(call.keywords):
                raise SyntaxError
            steps.append((call.func.id, options))
        except (SyntaxError, ValueError) as error:
            fault = "an empty step" if not text else f"the step {text!r} cannot be read"
            raise ValueError(
                f"layers={marked(layer, place)!r}: {fault}. Write Name, Name(option=value), + or |, joined by ->"
            ) from error
    if not any(name not in ("+", "|") for name, _ in steps):
        raise ValueError(f"layers={layer!r} holds no block. Write for example {PRE_NORM!r}")
    return steps


def format_step(name: str, options: dict[str, Any]) -> str:
    """('Attn', {'window': 64})  becomes  'Attn(window=64)'"""
    return f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())})" if options else name


def marked(layer: str, place: int) -> str:
    """'Norm->Atn->+' with place 1 is 'Norm->»Atn«->+': where in a layer string something is wrong."""
    steps = layer.split("->")
    return "->".join([*steps[:place], f"»{steps[place].strip()}«", *steps[place + 1 :]])


def to_json(config: ModelConfig | TrainConfig) -> str:
    """The config as JSON, one field a line. A tuple of layers is written {"tile": [...]}, so that lists stay lists."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(values.get("layers"), tuple):
        values["layers"] = {"tile": list(values["layers"])}
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in {"version": VERSION, **values}.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(config_class, text: str):
    """The config that `to_json` wrote. Raises ValueError for broken JSON and for an unknown or missing key, and names it."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("this JSON holds no config: it must be an object with a key for every field")
    values = migrate(config_class, values)
    defaults = {field.name: field.default for field in fields(config_class)}
    for name in values:
        if name not in defaults:
            raise ValueError(f"{config_class.__name__} has no field {name!r}.{did_you_mean(name, defaults)}")
    for name, default in defaults.items():
        if name not in values:
            line = f"{json.dumps(name)}: {json.dumps(default)},"
            raise ValueError(f"the field {name!r} of {config_class.__name__} is missing. To a file that is older add {line}")
    match values.get("layers"):
        case {"tile": [*tile], **rest} if not rest:
            values["layers"] = tuple(tile)
    for name in ("betas", "plugins"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return config_class(**values)


def migrate(config_class, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config file in today's fields, whatever version wrote it. Raises ValueError for a newer one."""
    values = dict(values)
    version = values.pop("version", 1)
    if version not in (1, VERSION):
        raise ValueError(f"version={version!r}: this file was written by a newer baseGPT; this one reads up to version {VERSION}")
    if version == 1 and config_class is ModelConfig:
        values.pop("attention", None)  # how a machine computes is now TrainConfig.fast
        if values.keys() >= {"layers", "mlp_dim", "gated"}:
            values["layers"] = with_real_widths(values["layers"], values["mlp_dim"], values["gated"])
            if values["mlp_dim"] and values["gated"]:
                values["mlp_dim"] = gated_width(values["mlp_dim"])
    if version == 1 and config_class is TrainConfig:
        if "weight_averaging" in values:
            values["ema_decay"] = values.pop("weight_averaging")
        values.setdefault("fast", TrainConfig.fast)
    return values


def with_real_widths(layers, mlp_dim: int | None, gated: bool):
    """The layers of a file of version 1, in which a gated MLP was 2/3 as wide as its mlp_dim says.

    Steps with an option mlp_dim get the real width; steps with an option gated that differs from the config get one.
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
    """table[name]. Raises ValueError with the nearest match and all names for one that is not there."""
    if name not in table:
        raise ValueError(f"no {kind} is called {name!r}.{did_you_mean(name, table)} There are: {', '.join(table)}")
    return table[name]


def did_you_mean(name: str, names) -> str:
    """' Did you mean X?' where a name is near, or nothing."""
    close = get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def require(condition: Any, config: ModelConfig | TrainConfig, name: str, cure: str):
    if not condition:
        raise ValueError(f"{name}={getattr(config, name)!r}: {cure}")


def check_types(config: ModelConfig | TrainConfig):
    """Dataclasses take anything; a config from a notebook or a file must hold what its annotations say."""
    for name, annotation in get_type_hints(type(config)).items():
        value = getattr(config, name)
        require(not isinstance(value, float) or math.isfinite(value), config, name, "give a finite number")
        try:
            is_switch = annotation is bool or bool in get_args(annotation)
            if isinstance(value, bool) and not is_switch:  # which Python would take for 0 or 1
                raise TypeCheckError("a switch is no number")
            check_type(value, annotation, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            choices = get_args(annotation) if get_origin(annotation) is Literal else ()
            expected = annotation.__name__ if isinstance(annotation, type) else annotation
            expected = f"one of {', '.join(choices)}" if choices else expected
            raise ValueError(f"{name}={value!r}: it must be {expected}.{did_you_mean(str(value), choices)}") from error


def init_parameters(block: type) -> dict[str, inspect.Parameter]:
    """The arguments of a block's __init__, including those of its base class that it passes on by **."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in block.__mro__:
        if "__init__" in vars(base):
            _, *own = inspect.signature(base.__init__).parameters.values()
            stars = {parameter.kind for parameter in own} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
            parameters = {parameter.name: parameter for parameter in own if parameter.kind not in stars} | parameters
            if inspect.Parameter.VAR_KEYWORD not in stars:
                break
    return parameters


def gated_width(mlp_dim: int) -> int:
    """Width of a gated MLP with as many parameters as an ungated one of width mlp_dim, to the nearest multiple of 8."""
    return max(8, round(mlp_dim * 2 / 3 / 8) * 8)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
