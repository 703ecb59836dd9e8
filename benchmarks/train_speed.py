"""Training speed and memory of our model against the same Llama of `transformers`.

    python benchmarks/train_speed.py
    python benchmarks/train_speed.py --sweep --set train.compile=False

A step is forward, backward, clipping and fused AdamW on random tokens: one story per row, or several in ours with
train.mask_stories=True. The variants take turns in rounds, so that other load on the machine affects all of them; ratios are
taken within a round.

"of peak" is relative to the fastest square matrix product in the same number format. A token costs 6 x the parameters in matrix
products + 12 x layers x T x dim x 1/2 FLOPs: only visible pairs of tokens count, half of all in a causal model, fewer with
masked stories, although some variants compute all.

B batch, T time.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablations import changed
from script import HERE, Row, in_new_process, new_process, quartiles, report, run_script

from config import ModelConfig, TrainConfig
from metrics.cost import num_parameters
from model import GPT
from modules import registry
from runs.execution import ExecutionPlan
from runs.presets import Preset
from training.autotune import choose_plan, matmul_peaks
from training.configure import configure_for_training
from training.machine import peak_memory_mb
from training.optim import build_optimizers, step_optimizers
from training.plan import STORY_TOKENS, apply_plan

CPU = torch.device("cpu")
SHAPE = Preset(
    ModelConfig(dim=128, num_layers=8, num_heads=4, num_kv_heads=2, mlp_dim=344, max_seq_len=256),
    TrainConfig(batch_size=32, max_minutes=10, mask_stories=False),
)
SHORT = ["model.num_layers=2", "train.batch_size=8", "train.compile=False"]
PEAKS = (512, 1024, 2048), 0.1  # sizes of square matrix products, seconds per size
VARIANTS = ("transformers_float32", "transformers_bfloat16_compiled", "ours_float32", "ours_probed")


@dataclass(frozen=True)
class Arguments:
    set: tuple[str, ...] = ()  # changes of the model and of our training, such as model.dim=64 train.compile=False
    vocab_size: int = 2048
    variants: tuple[str, ...] = VARIANTS  # to compare; ratios are relative to the first, and to those of transformers
    rounds: int = 9  # turns of each variant
    seconds: float = 2.0  # per turn
    sweep: bool = False  # measure only ours, over widths, depths and contexts
    dims: tuple[int, ...] = (64, 128, 256, 512)  # widths of the sweep, with the same head_dim and proportions of the MLP
    depths: tuple[int, ...] = (4, 8, 16, 32)  # numbers of layers of the sweep
    contexts: tuple[int, ...] = (128, 256, 512, 1024)  # max_seq_len of the sweep, with the same tokens per step
    short: bool = False  # quick check: two layers, eight rows, ours not compiled, three short rounds
    save: str | None = None  # write the raw results to benchmarks/results/SAVE.json


@dataclass(frozen=True)
class Variant:
    """A library, an execution plan and a model to measure."""

    library: str  # ours or transformers
    plan: ExecutionPlan
    shape: Preset
    vocab_size: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.shape.train.batch_size * self.shape.model.max_seq_len


def main(arguments: Arguments):
    shape = changed(changed(SHAPE, SHORT if arguments.short else []), arguments.set)
    if arguments.short:
        arguments = replace(arguments, rounds=min(3, arguments.rounds), seconds=min(0.7, arguments.seconds))
    raw = sweep(shape, arguments) if arguments.sweep else compare(shape, arguments)
    report(tables, raw, arguments.save)


def compare(shape: Preset, arguments: Arguments) -> dict:
    """Measure the variants in turns."""
    vocab_size = arguments.vocab_size
    num_parameters, ways = in_new_process(prepare, shape, vocab_size, arguments.variants)
    with ExitStack() as stack:
        processes = {name: stack.enter_context(new_process()) for name in ways}
        memory = {name: processes[name].submit(warm_up, variant).result() for name, variant in ways.items()}
        peaks = matmul_peaks(CPU, *PEAKS)
        speeds = {name: [] for name in ways}
        for _, (name, process) in itertools.product(range(arguments.rounds), processes.items()):
            speeds[name].append(process.submit(take_turn, arguments.seconds).result())
    peaks = {dtype: max(peak, peaks[dtype]) for dtype, peak in matmul_peaks(CPU, *PEAKS).items()}
    caption = describe_shape(shape, vocab_size, num_parameters)
    return raw_results(caption, arguments, peaks, {name: measured(ways[name], speeds[name], memory[name]) for name in ways})


def sweep(shape: Preset, arguments: Arguments) -> dict:
    """Measure ours over widths, depths and contexts, one at a time."""
    points = [wider(shape, dim) for dim in arguments.dims]
    points += [[f"model.num_layers={depth}"] for depth in arguments.depths]
    for context in arguments.contexts:
        rows = max(1, shape.train.batch_size * shape.model.max_seq_len // context)
        points.append([f"model.max_seq_len={context}", f"train.batch_size={rows}"])

    peaks, results = in_new_process(matmul_peaks, CPU, *PEAKS), {}
    for point in tqdm(points, leave=False, disable=None):
        (variant,) = in_new_process(list_variants, changed(shape, point), arguments.vocab_size, ["ours_probed"]).values()
        with new_process() as process:
            memory = process.submit(warm_up, variant).result()
            speeds = [process.submit(take_turn, arguments.seconds).result() for _ in range(arguments.rounds)]
        results[point[0].partition(".")[2]] = measured(variant, speeds, memory)
    return raw_results(describe_shape(shape, arguments.vocab_size), arguments, peaks, results)


def measured(variant: Variant, speeds: list[float], memory: tuple[float, float]) -> dict:
    """Raw results of a variant; the tokens/s are those of each round."""
    return {
        "plan": asdict(variant.plan), "parameters": num_parameters(registry.build_model(variant.shape.model, variant.vocab_size)),
        "flops_per_token": flops_per_token(variant), "tokens_per_second": speeds, "memory_mb": memory,
    }  # fmt: skip


def raw_results(shape: str, arguments: Arguments, peaks: dict[str, float], results: dict[str, dict]) -> dict:
    turns = f"{arguments.rounds} rounds of {arguments.seconds:g} s: medians and quartiles"
    return {"shape": shape, "turns": turns, "sweep": arguments.sweep, "peak_flops": peaks, "results": results}


def tables(raw: dict) -> dict[str, list[Row]]:
    """The table of a comparison or of a sweep."""
    peaks, results, rows = raw["peak_flops"], raw["results"], []
    first, *others = results
    compared = [] if raw["sweep"] else [first, *(name for name in others if name.startswith("transformers"))]
    for name, of in results.items():
        speeds, plan = of["tokens_per_second"], ExecutionPlan(**of["plan"])
        row = {"": name, "parameters": f"{of['parameters']}"} | quartiles("tokens/s", speeds, ".0f")
        for other in compared:
            row |= quartiles(f"times {other}", np.divide(speeds, results[other]["tokens_per_second"]), ".2f")
        row["of peak, %"] = f"{100 * np.median(speeds) * of['flops_per_token'] / peaks[plan.dtype]:.1f}"
        peak, without_imports = of["memory_mb"]
        row |= {"peak memory, MB": f"{peak:.0f}", "without imports, MB": f"{without_imports:.0f}", "how": str(plan)}
        rows.append(row)
    fastest = f"{peaks['float32'] / 1e9:,.0f} GFLOP/s in float32, {peaks['bfloat16'] / 1e9:,.0f} in bfloat16"
    return {f"{raw['shape']}. {raw['turns']}. The fastest matrix products: {fastest}.": rows}


def wider(shape: Preset, dim: int) -> list[str]:
    """Changes to another width: a different number of heads of the same size, an MLP of the same proportions."""
    model = shape.model
    head_dim, mlp_dim = model.block_values()["head_dim"], round(model.block_values()["mlp_dim"] * dim / model.dim)
    num_heads = max(1, dim // head_dim)
    num_kv_heads = max(1, num_heads * model.num_kv_heads // model.num_heads)
    values = {"dim": dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "mlp_dim": mlp_dim}
    return [f"model.{name}={value}" for name, value in values.items()]


def prepare(shape: Preset, vocab_size: int, names: Iterable[str]) -> tuple[int, dict[str, Variant]]:
    """The number of parameters, equal in both libraries, and the variants."""
    return check_same(shape, vocab_size), list_variants(shape, vocab_size, names)


def list_variants(shape: Preset, vocab_size: int, names: Iterable[str]) -> dict[str, Variant]:
    """Look up variants by name. Raises ValueError for an unknown name."""
    rows, threads = shape.train.batch_size, torch.get_num_threads()
    plain = ExecutionPlan("float32", fast=False, micro_batch_size=rows, threads=threads, compile=False)
    variants = {}
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"no variant is called {name!r}. There are: {', '.join(VARIANTS)}")
        plan = plain
        if name == "ours_probed":
            plan = choose_plan(build_model(shape, vocab_size), shape.train, CPU)
        if name == "transformers_bfloat16_compiled":
            plan = replace(plain, dtype="bfloat16", compile=True)
        variants[name] = Variant(name.partition("_")[0], plan, shape, vocab_size)
    return variants


def build_model(shape: Preset, vocab_size: int) -> GPT:
    torch.manual_seed(0)
    model = registry.build_model(shape.model, vocab_size)
    configure_for_training(model, shape.train)
    return model


def training_step(variant: Variant) -> Callable[[], float]:
    """Make a function that trains for one step as train.py does and returns the loss; initial weights are equal."""
    plan, model = variant.plan, build_model(variant.shape, variant.vocab_size)
    batch = made_up_tokens(variant.shape, variant.vocab_size)
    stories = made_up_stories(variant.shape) if variant.shape.train.mask_stories else None
    if variant.library == "ours":
        apply_plan(plan, model, variant.shape.train)
        optimizers = build_optimizers(model, variant.shape.train)
    else:
        model = llama(model)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=variant.shape.train.lr_max, fused=True)]
        if plan.compile:
            model.compile()

    def step() -> float:
        step_loss = 0.0
        for rows in batch.split(plan.micro_batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.dtype == "bfloat16"):
                loss = loss_of(model, rows, stories) * (len(rows) / len(batch))
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_optimizers(model, optimizers)
        return step_loss

    return step


def loss_of(model: torch.nn.Module, rows: torch.Tensor, stories: torch.Tensor | None = None) -> torch.Tensor:
    """Mean loss of rows (B, T + 1) by either library; stories (1, T) are only masked by ours."""
    inputs, targets = rows[:, :-1], rows[:, 1:].contiguous()  # (B, T)
    if isinstance(model, GPT):
        return model(inputs, targets, story_ids=None if stories is None else stories.expand_as(inputs))[1]
    return model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss


def made_up_tokens(shape: Preset, vocab_size: int) -> torch.Tensor:
    """(B, T + 1)"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (shape.train.batch_size, shape.model.max_seq_len + 1), generator=generator)


def made_up_stories(shape: Preset) -> torch.Tensor:
    """Story ids (1, T), of stories as long as in autotuning."""
    return (torch.arange(shape.model.max_seq_len) // STORY_TOKENS)[None]


def llama(model: GPT) -> torch.nn.Module:
    """The Llama of transformers, unmodified, with our weights."""
    sys.path.append(str(HERE.parent / "tests"))
    import references

    return references.llama(model).train()


def check_same(shape: Preset, vocab_size: int) -> int:
    """Return the number of parameters. Raises ValueError if parameters or losses of the two libraries differ.

    The initial weights are scaled up, so that every block affects the loss.
    """
    model, rows = build_model(shape, vocab_size), made_up_tokens(shape, vocab_size)[:2]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
        theirs = llama(model)
        losses = [loss_of(either, rows).item() for either in (model, theirs)]
    sizes = [sum(weight.numel() for weight in either.parameters()) for either in (model, theirs)]
    if sizes[0] != sizes[1] or not abs(losses[0] - losses[1]) < 1e-4:
        raise ValueError(f"the two models differ: {sizes} parameters, losses of {losses}. Take a shape that Llama supports")
    print(f"both models have {sizes[0]:,} parameters and the same loss within {abs(losses[0] - losses[1]):.1e}", file=sys.stderr)
    return sizes[0]


UNDER_WAY: list[tuple[Variant, Callable]] = []  # the variant that this process measures, and its step


def warm_up(variant: Variant) -> tuple[float, float]:
    """Prepare take_turn by three steps; return their peak memory in MB, in total and without imports."""
    import torch._dynamo  # every optimizer does so

    if variant.library == "transformers":
        import transformers.models.llama.modeling_llama  # noqa: F401
    imports = peak_memory_mb(CPU)
    torch.set_num_threads(variant.plan.threads)
    step = training_step(variant)
    for _ in range(3):
        step()
    UNDER_WAY[:] = [(variant, step)]
    peak = peak_memory_mb(CPU)
    return peak, peak - imports


def take_turn(seconds: float) -> float:
    """Tokens per second of the variant that warm_up prepared in this process."""
    ((variant, step),) = UNDER_WAY
    count, began = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < seconds:
        step()
        count += 1
    return count * variant.tokens / (time.perf_counter() - began)


def flops_per_token(variant: Variant) -> float:
    """FLOPs per token, forward and backward."""
    config = variant.shape.model
    T = config.max_seq_len
    stories = [T]
    if variant.library == "ours" and variant.shape.train.mask_stories:
        stories = torch.bincount(made_up_stories(variant.shape)[0]).tolist()
    attended = sum(length**2 for length in stories) / T / 2  # mean number of visible tokens
    model = registry.build_model(config, variant.vocab_size)
    in_products = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    attention_dim = config.num_heads * config.block_values()["head_dim"]
    return 6 * in_products + 12 * config.num_layers * attended * attention_dim


def describe_shape(shape: Preset, vocab_size: int, num_parameters: int | None = None) -> str:
    model = shape.model
    size = f", {num_parameters / 1e6:.2f}M parameters" if num_parameters else ""
    masks = f", ours with masked stories of {STORY_TOKENS} tokens" if shape.train.mask_stories else ""
    return (
        f"dim {model.dim}, {model.num_layers} layers, {model.num_heads} heads, {model.num_kv_heads} kv heads, "
        f"T {model.max_seq_len}, vocabulary {vocab_size}{size}, batch {shape.train.batch_size}{masks}"
    )


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
