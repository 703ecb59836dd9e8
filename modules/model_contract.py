"""The contract of whole models, as checks; they run before every training of a plugin's model or block.

    check_model(build_model(config, vocab_size))
    check_model(config, vocab_size=256)

A model whose class has `causal = False` is not read from left to right: nothing that concerns the future is checked, and it needs
story_nats to be scored (modules/registry.py).

B batch, T time, M tokens of memory, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE, ModelConfig, init_parameters, layer_steps
from data.cache import say
from model import Norm
from modules import contract
from modules.blame import TOLERANCE, blame, first_difference, hidden_weights, record_calls, relative_error
from modules.cached_decoding import cache_is_exact, find_inexact_cache
from modules.contract import NOT_SAVED, VOCAB_SIZE, ContractError, require
from modules.explain import explain
from modules.model_trial import B, ModelTrial, errors_of, is_causal, plugin_layers, watched_blocks
from modules.registry import build_model, find_block, takes

__all__ = ["ContractError", "cache_is_exact", "check_model", "try_out"]

WINDOW = 9
CUTS = (1, 40, 70, 129)  # where the future starts
DRAWS = 20  # training passes in which every weight of a model that draws random numbers must get a gradient
LEAST_GRADIENT = 1e-5  # relative to the largest one; smaller ones are rounding errors, as of a Fourier transform
MASK = "Mask them; or if that is meant, write causal = False in the class of the model, and give it story_nats"


def check_model(model: nn.Module | ModelConfig, vocab_size: int = VOCAB_SIZE):
    """Check the contract of a whole model, on random weights and tokens. The model stays as it is.

    Parameters
    ----------
    model : nn.Module or ModelConfig
        A model from `build_model`, or a config to build one from.
    vocab_size : int, optional
        The vocabulary of a model that is built from a config.

    Raises
    ------
    ContractError
        One line: the first promise that it breaks, where, and the cure.

    Examples
    --------
    >>> check_model(ModelConfig(dim=16))
    """
    model = build_model(model, vocab_size) if isinstance(model, ModelConfig) else model
    for error, check in broken_promises(model).items():
        if check not in ADVICE:
            raise error


def try_out(model: nn.Module):
    """Check a model before training, if plugins or a block that is not causal have a part in it.

    Prints a line for each broken promise, and for each layer that ends without its skip. Raises ContractError for one that makes
    training meaningless: it cannot run, sees the future, its targets or other rows, or cannot be loaded again.
    """
    if model.config.plugins or not is_causal(model):
        problems = broken_promises(model)
        fatal = [error for error, check in problems.items() if check in FATAL]
        for error in problems:
            if error not in fatal[:1]:
                say(f"warning: {error}")
        if fatal:
            raise fatal[0]
        if takes(model, "cache") and (inexact := find_inexact_cache(model)) and inexact.is_optional:
            say(f"{inexact.reason}: the model will write without a cache, slower")
    for layer in dict.fromkeys(model.config.layer_strings):
        names = [name for name, _ in layer_steps(layer)]
        block = find_block(names[-1], model.config) if names[-1] not in "+|" else Norm  # a norm may be the last, as in post-norm
        if {"+", "|"} & set(names) and not issubclass(block, Norm) and "layer" not in init_parameters(block):
            say(f"warning: no + after {names[-1]}, the last block of a layer: its output replaces the whole residual stream")


def broken_promises(model: nn.Module) -> dict[ContractError, Callable]:
    """The promises that a model breaks, each with its check. Checks that rely on one of them are left out."""
    problems = {}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        trial = ModelTrial(model)
        for check in CHECKS:
            if getattr(model, "causal", True) or check in FOR_ANY_ORDER:
                try:
                    with errors_of(trial):
                        check(trial)
                except ContractError as error:
                    problems[error] = check
                    if check in BASIC:
                        break
    return problems


def check_registered(trial: ModelTrial):
    """All weights are those that torch knows of."""
    for problem in hidden_weights(trial.model):
        raise ContractError(problem)


def check_order(trial: ModelTrial):
    """What is not read from left to right is scored by its own likelihood."""
    is_scored = getattr(trial.model, "causal", True) or hasattr(trial.model, "story_nats")
    cure = "give it story_nats(stories), the nats of each story"
    require(is_scored, f"{trial.name} has causal = False, so its logits do not score it: {cure}")
    is_said = not hasattr(trial.model, "story_nats") or isinstance(getattr(trial.model, "is_bound", None), bool)
    require(is_said, f"{trial.name} has story_nats, but no is_bound: set it to True for an upper bound, False for exact losses")


def check_training(trial: ModelTrial):
    """Two steps of training work."""
    model = trial.copy().train()
    with watched_blocks(model):
        for step in range(2):
            tokens = trial.tokens(B, trial.short, seed=step)
            targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORE) if trial.short > 1 else tokens
            _, loss = trial.run(model, tokens, targets, story_ids=torch.zeros(trial.short, dtype=torch.long))
            require(isinstance(loss, Tensor), f"the loss of {trial.name} is {loss!r:.50} with targets: return a tensor")
            which = next((f" {name!r}" for name, value in getattr(model, "losses", {}).items() if value.dim()), "")
            require(loss.dim() == 0, f"the loss{which} of {trial.name} has the shape {tuple(loss.shape)}: take its mean")
            require(loss.isfinite(), f"the loss of {trial.name} is {loss.item()} on random weights and tokens: it must be finite")
            try:
                loss.backward()
            except RuntimeError:  # which does not say in which block
                for name, layer in plugin_layers(trial.config):
                    with contract.one_line(name):
                        contract.check_layer(layer, trial.config, (contract.check_repeats, contract.check_gradients))
                raise
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.grad is not None:
                        weight.sub_(weight.grad, alpha=1e-4)
            model.zero_grad()


@torch.no_grad()
def check_outputs(trial: ModelTrial):
    """In eval there are logits for every token, whatever the length."""
    for T in dict.fromkeys((trial.short, 1, trial.long)):
        with watched_blocks(trial.evaluated):
            logits = trial.logits(trial.tokens(B, T))
        require(isinstance(logits, Tensor), f"the logits of {trial.name} are {type(logits).__name__} in eval: return a tensor")
        expected, shape = (B, T, trial.model.vocab_size), tuple(logits.shape)
        require(shape == expected, f"the logits of {trial.name} are {shape}: they must be (B, T, vocab_size), here {expected}")
        problem = f"the logits of {trial.name} are {logits.dtype}: make them float32, as by .float()"
        require(logits.dtype == torch.float32, problem)
        require(logits.isfinite().all(), f"the logits of {trial.name} are not finite on random weights and tokens")


@torch.no_grad()
def check_state(trial: ModelTrial):
    """A result does not depend on what was read before."""
    tokens, model = trial.tokens(B, trial.short), trial.evaluated
    run, read_another = partial(trial.run, model, tokens, tokens), partial(trial.run, model, trial.other_tokens(tokens), tokens)
    first, _, second = run(), read_another(), run()
    if not same(first, second):
        read_another()
        problem = f"{trial.name} gives another result{trial.parting(model, run, run)} after it has read something else"
        raise ContractError(f"{problem}: keep nothing from call to call in eval but what is in `cache`")


@torch.no_grad()
def check_random_numbers(trial: ModelTrial):
    """Eval draws none."""
    tokens, model = trial.tokens(B, trial.short), trial.evaluated
    trial.logits(tokens)
    if trial.drew_random_numbers():
        place = trial.parting(model, *(partial(trial.run, model, tokens, seed=seed) for seed in (0, 1)))
        raise ContractError(f"{trial.name} draws random numbers in eval{place}: draw them only where self.training")


@torch.no_grad()
def check_buffers(trial: ModelTrial):
    """Eval changes no buffer."""
    buffers = {name: value.clone() for name, value in trial.evaluated.named_buffers()}
    trial.logits(trial.tokens(B, trial.short))
    for name, value in trial.evaluated.named_buffers():
        require(value.equal(buffers[name]), f"{trial.name} changes its buffer {name} in eval: change it only where self.training")


def same(ours: tuple, expected: tuple) -> bool:
    """Whether logits and losses agree, as far as there are any."""
    pairs = [pair for pair in zip(ours, expected, strict=True) if all(isinstance(value, Tensor) for value in pair)]
    return all(relative_error(*pair) < TOLERANCE for pair in pairs)


@torch.no_grad()
def check_rows(trial: ModelTrial):
    """A row gives the same alone and with any others."""
    tokens, model = trial.tokens(B, trial.short), trial.evaluated
    batches = (tokens, tokens[:1], torch.cat([tokens[:1], trial.other_tokens(tokens)[1:]]))
    for batch in batches[1:]:
        if relative_error(trial.logits(batch)[:1], trial.logits(tokens)[:1]) >= TOLERANCE:
            place = trial.parting(model, *(partial(trial.run, model, each) for each in (tokens, batch)), rows=slice(1))
            raise ContractError(f"{trial.name} mixes the rows of a batch{place}: each must give what it gives alone")


def check_future(trial: ModelTrial):
    """Later tokens change no logits before them: in eval, with a window, with several stories in a row, and in training."""
    T, views = trial.long, {"": {}, " (with a window)": {"window": WINDOW}}
    views[" (with several stories in a row)"] = {"story_ids": torch.arange(T) * 3 // T}
    for where, kwargs in views.items():
        if all(takes(trial.model, name) for name in kwargs):
            require_no_future(trial, lambda: trial.evaluated, where, T, CUTS, **kwargs)
    require_no_future(trial, lambda: trial.copy().train(), " (in training)", T, CUTS, targets=trial.tokens(1, T, seed=2))
    for scale in (1.0, 0.2):  # with large weights, a softmax may choose one token alone, and hide a leak
        model = trial.copy(scale).eval()
        require_no_future(trial, lambda model=model: model, "", trial.short, range(1, trial.short))
        require_no_future_gradient(trial, model)


@torch.no_grad()
def require_no_future(trial: ModelTrial, make: Callable[[], nn.Module], where: str, T: int, cuts, targets=None, **kwargs):
    tokens, cuts = trial.tokens(1, T), [cut for cut in cuts if cut < T]
    others, logits = trial.other_tokens(tokens), trial.run(make(), tokens, targets, **kwargs)[0]
    if not cuts or logits is None:  # a model may return none in training
        return
    changed = torch.cat([torch.cat([tokens[:, :cut], others[:, cut:]], dim=1) for cut in cuts])  # (cuts, T)
    # in training, rows may share something, such as the capacity of experts
    ours = [trial.run(make(), rows, targets, **kwargs)[0] for rows in (changed.split(1) if targets is not None else [changed])]
    for row, (cut, after) in enumerate(zip(cuts, torch.cat(ours), strict=True)):
        if relative_error(after[:cut], logits[0, :cut]) >= TOLERANCE:
            model = make()
            runs = (partial(trial.run, model, inputs, targets, **kwargs) for inputs in (tokens, changed[row, None]))
            place = trial.parting(model, *runs, cut)
            problem = f"{trial.name} sees the future{where}{place}: tokens from position {cut} on change earlier logits"
            raise ContractError(f"{problem}. {MASK}")


def require_no_future_gradient(trial: ModelTrial, model: nn.Module):
    """The logits of each token have no gradient with respect to the embeddings of later ones: row t is asked for those of t."""
    rows = torch.arange(trial.short, device=trial.device)
    tokens, embedded = trial.tokens(1, trial.short).expand(trial.short, -1), []

    def keep(module, inputs, output):
        if isinstance(module, nn.Embedding) and inputs[0].shape == tokens.shape and output.requires_grad:
            output.retain_grad()
            embedded.append(output)

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        logits = trial.run(model, tokens)[0][rows, rows]  # (T, V)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.backends.cudnn.flags(enabled=False):  # which has no backward pass of recurrent layers in eval
        if embedded:
            (logits * torch.randn_like(logits)).sum().backward()
    for output in embedded:
        sizes = output.grad.norm(dim=-1)  # (T, T)
        leak = sizes.triu(1).max() / sizes.max().clamp(min=1e-20)
        problem = f"{trial.name} sees the future: the logits of a token have a gradient to the embeddings of later ones"
        require(leak < LEAST_GRADIENT, f"{problem}. {MASK}")


@torch.no_grad()
def check_targets(trial: ModelTrial):
    """The targets change no logits."""
    tokens = trial.tokens(B, trial.short)
    pairs = (tokens, tokens), (tokens, trial.other_tokens(tokens))
    for mode, make in {"eval": lambda: trial.evaluated, "training": lambda: trial.copy().train()}.items():
        logits, others = (trial.run(make(), *pair)[0] for pair in pairs)
        if logits is not None and relative_error(others, logits) >= TOLERANCE:
            model = make()
            place = trial.parting(model, *(partial(trial.run, model, *pair) for pair in pairs))
            problem = f"{trial.name} reads its targets{place}: in {mode}, others change its logits"
            raise ContractError(f"{problem}. Only the loss may depend on them")
    expected = trial.run(trial.evaluated, tokens, tokens)[0]
    is_same = relative_error(trial.logits(tokens), expected) < TOLERANCE
    require(is_same, f"{trial.name} reads its targets: in eval, its logits are others without them")


@torch.no_grad()
def check_saved(trial: ModelTrial):
    """The state dict holds all that the model has learned."""
    torch.manual_seed(1)
    needs = {"tokenizer": trial.model.tokenizer} if "tokenizer" in init_parameters(type(trial.model)) else {}
    loaded = build_model(trial.config, trial.model.vocab_size, **needs).to(trial.device).eval()
    is_built = isinstance(trial.model, type(loaded))
    require(is_built, f"{trial.name} of its config is a {type(loaded).__name__}, but it is a {type(trial.model).__name__}")
    loaded.load_state_dict(trial.evaluated.state_dict())
    tokens = trial.tokens(B, trial.short)
    results = (trial.run(model, tokens, tokens) for model in (loaded, trial.evaluated))
    require(same(*results), f"{trial.name}: {NOT_SAVED}")


@torch.no_grad()
def check_stories(trial: ModelTrial):
    """Stories that share a row give what each gives alone."""
    if takes(trial.model, "story_ids"):
        tokens, model = trial.tokens(B, trial.long), trial.evaluated
        lengths = [length for length in (5, 1, trial.long // 2) if trial.long > 12]
        lengths.append(trial.long - sum(lengths))
        story_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        together = record_calls(model, [partial(trial.run, model, tokens, story_ids=story_ids)])
        alone = record_calls(model, [partial(trial.run, model, story) for story in tokens.split(lengths, dim=1)])
        fault = first_difference(model, alone, together, trial.long)
        if fault is not None:
            block = blame(fault, model)
            cure = "" if takes(block, "story_start") or block is model else ": its forward must ask for `story_start`"
            raise ContractError(f"{trial.name} lets the stories of a row see each other{trial.place(fault, model)}{cure}")


def check_cache(trial: ModelTrial):
    """With a cache it writes what it writes without; a block may take none, as long as the cache is then not used."""
    inexact = find_inexact_cache(trial.model)
    require(inexact is None or inexact.is_optional, inexact and f"{inexact.reason}: it will write without one, slower")


def check_loss(trial: ModelTrial):
    """The loss is the mean cross-entropy of the logits, and what the model adds to it."""
    tokens = trial.tokens(B, trial.short + 1)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    for mode, model in {"eval": trial.evaluated, "training": trial.copy().train()}.items():
        model.own_loss = None  # what --train.loss minimises in place of it is another kind of loss
        logits, loss = trial.run(model, tokens, targets)
        if logits is None or loss is None:
            continue
        is_softmax = (logits >= 0).all() and (logits.sum(dim=-1) - 1).abs().max() < 1e-3
        require(not is_softmax, f"the logits of {trial.name} are probabilities: return them as they are before the softmax")
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        added = sum(value for name, value in getattr(model, "losses", {}).items() if name != "next_token" and mode == "training")
        share = ((loss - added) / nats).item()
        is_sum = abs(share / targets.numel() - 1) < 0.01
        require(not is_sum, f"the loss of {trial.name} is a sum over the targets: return their mean, as cross_entropy does")
        problem = f"the loss of {trial.name} in {mode} is {share:.0%} of the cross-entropy of its logits"
        require(share > 0.95, f"{problem}: it must not know more than they do, unless it is another kind of loss")


def check_scored_targets(trial: ModelTrial):
    """Of targets that are IGNORE but for one, that one is scored, by the logits of its own position."""
    T = trial.short
    tokens, position = trial.tokens(1, T), T // 2
    targets = torch.full_like(tokens, IGNORE)
    targets[:, position] = tokens[:, position]
    logits, loss = trial.run(trial.evaluated, tokens, targets)
    if loss is None or not (loss.requires_grad and logits.requires_grad):
        return
    (gradient,) = torch.autograd.grad(loss, logits, allow_unused=True)
    if gradient is not None and T > 1:
        sizes = gradient.norm(dim=-1)[0]  # (T,)
        others = torch.cat([sizes[:position], sizes[position + 1 :]])
        problem = f"{trial.name} does not score a target by the logits of its position"
        require(sizes[position] > 0, f"{problem}: targets are the next tokens already, so do not shift them again")
        cure = "leave them out, as F.cross_entropy(..., ignore_index=IGNORE) does"
        require(others.max() < 0.1 * sizes[position], f"{trial.name} scores targets that are IGNORE, such as padding: {cure}")


def check_weights(trial: ModelTrial):
    """A gradient reaches every weight."""
    model = trial.copy().train()
    tokens, unreached = trial.tokens(B, trial.long), dict(model.named_parameters())
    for seed in range(DRAWS):
        _, loss = trial.run(model, tokens, tokens, seed, story_ids=torch.zeros(trial.long, dtype=torch.long))
        loss.backward()
        unreached = {name: weight for name, weight in unreached.items() if weight.requires_grad and weight.grad is None}
        if not unreached or not trial.drew_random_numbers(seed):
            break
    names = ", ".join([*unreached][:3])
    require(not unreached, f"no gradient reaches {names} of {trial.name}, which stays as it is: use it, or leave it out")


def check_bfloat16(trial: ModelTrial):
    """It trains in bfloat16, too, which is faster on some machines."""
    model, tokens = trial.copy().train(), trial.tokens(B, trial.short)
    cure = "convert what needs it by .float(), or train with --train.dtype float32"
    try:
        with torch.autocast(trial.device.type, torch.bfloat16):
            logits, loss = trial.run(model, tokens, tokens)
        loss.backward()
    except RuntimeError as error:
        raise ContractError(f"{trial.name} cannot be trained in bfloat16 ({explain(error)}): {cure}") from error
    dtype = torch.float32 if logits is None else logits.dtype
    require(dtype in (torch.float32, torch.bfloat16), f"the logits of {trial.name} are {dtype} in bfloat16: {cure}")
    numbers = [loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)]
    is_finite = all(number.isfinite().all() for number in numbers)
    require(is_finite, f"{trial.name} has a loss or gradients in bfloat16 that are not finite: {cure}")


CHECKS = (
    check_order, check_registered, check_outputs, check_training, check_random_numbers, check_state, check_rows, check_future,
    check_targets, check_saved, check_stories, check_cache, check_loss, check_scored_targets, check_weights, check_buffers,
    check_bfloat16,
)  # fmt: skip
# the checks after these rely on them
BASIC = (check_registered, check_outputs, check_training, check_random_numbers, check_state, check_rows, check_future)
FATAL = (*BASIC, check_order, check_targets, check_saved)  # without these, training is meaningless
ADVICE = (check_bfloat16,)  # what need not be so
FOR_ANY_ORDER = (check_order, check_registered, check_training, check_saved, check_weights, *ADVICE)  # with causal = False, too
