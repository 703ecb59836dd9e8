"""Promises of model.py: it agrees with other people's implementations, and the layer string means what it says."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import references
import torch
import torch.nn.functional as F
from errors import one_line_error
from torch import nn

from config import SANDWICH_NORM, ModelConfig, gated_width
from metrics.cost import num_parameters
from model import GPT, IGNORE, MLP, Attention, Branch, Cache, Layer, LayerNorm, RMSNorm, masked_attention
from modules.norms import CosineNorm
from modules.registry import all_blocks, build_branch, build_model
from runs.presets import PRESETS, preset

V = 98
TINY = ModelConfig(dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=32)
POSITIONS = ("rope", "learned", "sinusoidal", "none")
VARIANTS = {
    **{positions: replace(TINY, positions=positions) for positions in POSITIONS},
    "qk_norm": replace(TINY, qk_norm=True, norm="CosineNorm", num_kv_heads=1),
    "soft_caps": replace(TINY, attention_soft_cap=2.0, logit_soft_cap=0.5, logit_scale=1.7),
    "parallel": replace(TINY, layers=["Norm->Attn->+->Norm->MLP->+", "Norm->Attn->+"]),
    "modules": replace(
        TINY, zero_init=True, tied_embeddings=False, layers=(
            "Bigram(size=64)->Norm->|->Shortcut->Norm->ShortConv->ValueAttn->+->Norm->MLP->+",
            "Shortcut->|->Norm->ValueAttn(embedding=True, qk_norm=True)->+->Norm->ShortConv(width=3)->MLP->+",
        ),
    ),
}  # fmt: skip


def randomised(model: GPT, seed: int = 0) -> GPT:
    """Add noise to every weight, so that no gain of 1, no bias of 0 and no small matrix hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def build(config: ModelConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return randomised(build_model(config, V)).eval()


EVERY_MODEL = {name: model for name, (model, _) in PRESETS.items()} | VARIANTS

REFERENCES = {
    "llama3_like": (preset("llama3_like").model, references.llama),
    "llama3_like, attention written out": (replace(preset("llama3_like").model, attention_soft_cap=1e4), references.llama),
    "the_default": (ModelConfig(), references.llama),
    "gpt2_like": (preset("gpt2_like").model, references.gpt2),
    "gemma1_like": (preset("gemma1_like").model, references.gemma),
    "gemma2": (replace(preset("gemma2_like").model, layers=SANDWICH_NORM), references.gemma2),
}


@pytest.mark.parametrize("config, reference", REFERENCES.values(), ids=REFERENCES)
def test_logits_gradients_and_size_equal_transformers(config: ModelConfig, reference: Callable):
    torch.manual_seed(0)
    model = build_model(config, V).eval()
    with torch.no_grad():
        for weight in model.layers.parameters():  # matrices large enough to matter, norms and biases away from 1 and 0
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.normal_(std=(3 * weight.shape[1]) ** -0.5)
    theirs = reference(model)
    tokens = some_tokens(2, 41)

    logits, _ = model(tokens[:, :-1])
    expected = theirs(tokens[:, :-1]).logits
    assert logits.std() > 0.1  # so that 1e-5 says something
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    _, loss = model(tokens[:, :-1], tokens[:, 1:])
    expected_loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)
    loss.backward()
    expected_loss.backward()
    for ours, other in ((model.embedding, theirs.get_input_embeddings()), (model.head, theirs.get_output_embeddings())):
        torch.testing.assert_close(ours.weight.grad, other.weight.grad, atol=1e-4, rtol=0)
    if reference is references.llama:
        their_gradients = {name: weight.grad for name, weight in theirs.named_parameters(remove_duplicate=False)}
        for name, weight in references.llama_names(model).items():
            torch.testing.assert_close(weight.grad, their_gradients[name], atol=1e-4, rtol=0)

    assert num_parameters(model) == theirs.num_parameters()
    tables = ("embed_tokens", "wte", "wpe", "lm_head")
    sizes = [weight.numel() for name, weight in theirs.named_parameters() if name.split(".")[-2] not in tables]
    assert num_parameters(model, embeddings=False) == sum(sizes)


@pytest.mark.parametrize("affine, bias", [(False, False), (True, False), (True, True)])
def test_norms_equal_torch(affine, bias):
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    norms = {norm: norm(12, norm_affine=affine, norm_bias=bias, norm_eps=1e-3) for norm in (RMSNorm, LayerNorm, CosineNorm)}
    for norm in norms.values():
        for weight in norm.parameters():
            nn.init.normal_(weight)
        assert sum(weight.numel() for weight in norm.parameters()) == 12 * (affine + bias)

    def gain(norm):
        return norm.weight if affine else 1.0

    def shift(norm):
        return norm.bias if bias else 0.0

    rms, layer, cosine = norms.values()
    expected_rms = nn.RMSNorm(12, eps=1e-3, elementwise_affine=False)(x) * gain(rms) + shift(rms)
    expected_layer = nn.LayerNorm(12, eps=1e-3, elementwise_affine=False)(x) * gain(layer) + shift(layer)
    expected_cosine = x / x.square().sum(-1, keepdim=True).sqrt() * gain(cosine) + shift(cosine)
    torch.testing.assert_close(rms(x), expected_rms)
    torch.testing.assert_close(layer(x), expected_layer)
    torch.testing.assert_close(cosine(x), expected_cosine)
    assert torch.isfinite(cosine(torch.zeros(1, 12))).all()


def test_a_new_norm_gives_channels_of_size_one():
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * 7
    for norm in (RMSNorm, LayerNorm, CosineNorm):
        torch.testing.assert_close(norm(64)(x).square().mean(-1), torch.ones(2, 5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("config", EVERY_MODEL.values(), ids=EVERY_MODEL)
def test_every_parameter_learns_and_none_sees_the_future(config: ModelConfig):
    model = build(config)
    tokens = some_tokens(2, 21)
    logits, loss = model(tokens[:, :-1], tokens[:, 1:])
    assert logits.shape == (2, 20, V) and logits.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(-1, V), tokens[:, 1:].reshape(-1)))
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name

    changed = tokens[:, :-1].clone()
    changed[:, 12] = (changed[:, 12] + 1) % V
    with torch.no_grad():
        other, _ = model(changed)
    torch.testing.assert_close(other[:, :12], logits[:, :12].detach(), atol=1e-5, rtol=1e-5)
    assert (other[:, 12] - logits[:, 12]).abs().max() > 1e-4


@pytest.mark.parametrize("config", EVERY_MODEL.values(), ids=EVERY_MODEL)
@torch.no_grad()
def test_the_cache_changes_nothing(config: ModelConfig):
    model, tokens = build(config), some_tokens(3, 30)
    expected, _ = model(tokens)
    # A stack of Mambas with weights as large as these makes up to 2e-4 of what is rounded off, by the seed.
    rounding = 5e-4 if "->Mamba->" in str(config.layers) else 1e-4
    for chunks in ([30], [1] * 30, [7, 1, 1, 13, 8], [1, 29]):
        cache = Cache()
        parts = [model(part, cache=cache)[0] for part in tokens.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=rounding * expected.abs().max().item(), rtol=0)
        assert cache.num_tokens == 30


@torch.no_grad()
def test_a_layer_that_runs_several_times_has_a_cache_for_each_turn():
    model, tokens = build(TINY), some_tokens(2, 20)
    model.layers = nn.ModuleList([*model.layers] * 3)
    cache = Cache()
    parts = [model(part, cache=cache)[0] for part in tokens.split([7, 1, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_packed_stories_do_not_see_each_other(config: ModelConfig):
    model, tokens = build(config), some_tokens(2, 24)
    lengths = ((5, 1, 18), (11, 13))
    story_ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    packed, _ = model(tokens, story_ids=story_ids)
    for row, sizes in enumerate(lengths):
        alone = torch.cat([model(story[None])[0][0] for story in tokens[row].split(sizes)])
        torch.testing.assert_close(packed[row], alone, atol=1e-4, rtol=1e-4)
    together, _ = model(tokens)
    assert (together[:, 15:] - packed[:, 15:]).abs().max() > 1e-3


def test_ignored_targets_do_not_count_and_micro_batches_add_up():
    model = build(TINY)
    tokens, targets = some_tokens(6, 12), some_tokens(6, 12, seed=1)
    for row in range(6):
        targets[row, 2 * row :] = IGNORE
    logits, loss = model(tokens, targets)
    scored = targets != IGNORE
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[scored].gather(-1, targets[scored][:, None]).mean())
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    micro_batches = zip(tokens.split(4), targets.split(4), strict=True)
    total = sum(model(tokens, targets)[1] * (targets != IGNORE).sum() / scored.sum() for tokens, targets in micro_batches)
    torch.testing.assert_close(total, loss)
    for ours, expected in zip(torch.autograd.grad(total, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def branch(layer: str, config: ModelConfig = TINY) -> Branch:
    torch.manual_seed(0)
    return randomised(build_branch(layer, config, V))


def by_hand(layer: str, x: torch.Tensor, blocks: list[Callable]) -> torch.Tensor:
    """The layer strings of the test below, written out."""
    match layer, blocks:
        case "Norm->MLP->+->Norm->MLP->+", [n1, m1, n2, m2]:  # pre-norm
            h = x + m1(n1(x))
            return h + m2(n2(h))
        case "MLP->+->Norm->|->MLP->+->Norm", [m1, n1, m2, n2]:  # post-norm: the skip starts after the norm
            h = n1(x + m1(x))
            return n2(h + m2(h))
        case "MLP->+->Norm->MLP->+", [m1, n1, m2]:  # without | the skip starts right after +
            h = x + m1(x)
            return h + m2(n1(h))
        case "Norm->MLP->Norm->+", [n1, m1, n2]:  # sandwich
            return x + n2(m1(n1(x)))
        case "Norm->MLP", [n1, m1]:
            return m1(n1(x))
        case "MLP->|->MLP", [m1, m2]:  # a skip that is never added
            return m2(m1(x))
    raise AssertionError(layer)


@pytest.mark.parametrize(
    "layer",
    [
        "Norm->MLP->+->Norm->MLP->+", "MLP->+->Norm->|->MLP->+->Norm", "MLP->+->Norm->MLP->+", "Norm->MLP->Norm->+",
        "Norm->MLP", "MLP->|->MLP",
    ],
)  # fmt: skip
def test_the_layer_string_means_what_it_says(layer):
    x = torch.randn(2, 5, 24)
    module = branch(layer)
    torch.testing.assert_close(module(x), by_hand(layer, x, list(module.blocks)))


def test_a_list_of_strings_is_parallel_branches():
    x = torch.randn(2, 5, 24)
    torch.manual_seed(0)
    layer = randomised(Layer(["Norm->MLP->+->Norm->MLP->+", "Norm->MLP(gated=False)->+"], TINY, all_blocks(TINY), 1.0, V))
    n1, m1, n2, m2 = layer.branches[0].blocks
    n3, m3 = layer.branches[1].blocks
    dense = m1(n1(x)) + m2(n2(x + m1(n1(x))))
    torch.testing.assert_close(layer(x), x + dense + m3(n3(x)))


def test_a_tuple_of_layers_tiles_the_depth():
    config = replace(TINY, num_layers=4, layers=("Norm->Attn->+", ["Norm->MLP->+", "Norm->Attn->+"]))
    kinds = [[[type(b).__name__ for b in branch.blocks] for branch in layer.branches] for layer in build_model(config, V).layers]
    assert kinds == [[["RMSNorm", "Attention"]], [["RMSNorm", "MLP"], ["RMSNorm", "Attention"]]] * 2


def test_layers_without_a_skip_can_be_built():
    assert build_model(replace(TINY, layers="Norm->Attn->MLP"), V)(some_tokens(1, 4))[0].isfinite().all()


def test_options_in_the_string_win_over_the_config():
    attention_part = "LayerNorm(norm_bias=True)->Attn(num_kv_heads=1, qk_norm=True)->+"
    layer = f"{attention_part}->Norm->MLP(mlp_dim=64, gated=False, activation='ReLU')->+"
    norm, attention, default_norm, mlp = branch(layer, replace(TINY, norm="CosineNorm")).blocks
    assert isinstance(norm, LayerNorm) and norm.bias is not None
    assert isinstance(default_norm, CosineNorm) and default_norm.bias is None
    assert attention.w_k.weight.shape == (8, 24) and attention.q_norm is not None
    assert mlp.w_in.weight.shape == (64, 24) and mlp.w_gate is None
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(mlp(x), mlp.w_out(mlp.w_in(x).clamp(min=0)))


@pytest.mark.parametrize("mlp_dim", [24, 64, 100, 512, 1152])
def test_a_gated_mlp_of_gated_width_has_as_many_parameters(mlp_dim):
    gated, plain = MLP(64, gated_width(mlp_dim)), MLP(64, mlp_dim, gated=False)
    assert abs(num_parameters(gated) - num_parameters(plain)) <= 3 * 64 * 4  # three matrices, to the nearest multiple of 8


@pytest.mark.parametrize("gated, width", [(True, 64), (False, 96)])
def test_mlp_dim_is_the_hidden_width_and_4_dim_by_default(gated, width):
    assert branch("MLP", replace(TINY, gated=gated)).blocks[0].w_in.weight.shape == (width, 24)
    assert branch("MLP", replace(TINY, gated=gated, mlp_dim=50)).blocks[0].w_in.weight.shape == (50, 24)
    assert branch("MLP(mlp_dim=30)", replace(TINY, gated=gated, mlp_dim=50)).blocks[0].w_in.weight.shape == (30, 24)


@pytest.mark.parametrize(
    "activation, formula",
    [
        ("SiLU", nn.SiLU()),
        ("GELU", nn.GELU(approximate="tanh")),
        ("ReLU", nn.ReLU()),
        ("ReLU2", lambda x: nn.ReLU()(x) ** 2),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_the_mlp(activation, formula, gated):
    mlp, x = MLP(24, 48, activation, gated, linear_bias=True), torch.randn(2, 3, 24)
    hidden = formula(mlp.w_gate(x)) * mlp.w_in(x) if gated else formula(mlp.w_in(x))
    torch.testing.assert_close(mlp(x), mlp.w_out(hidden))


@pytest.mark.parametrize(
    "layer, words",
    [
        ("Norm->Atn->+", ["»Atn«", "'Atn'", "Did you mean 'Attn'", "Norm, Attn, MLP"]),
        ("Norm->Hyena->+", ["'Hyena'", "There are: Norm, Attn, MLP"]),
        ("Norm->MLP(mlpdim=64)->+", ["MLP", "'mlpdim'", "Did you mean 'mlp_dim'", "activation"]),
        ("Norm->Attn(windw=64)->+", ["Norm->»Attn(windw=64)«->+", "'windw'", "Did you mean 'window'", "num_heads"]),
        ("Norm->Attn(window='64')->+", ["»Attn(window='64')«", "window='64'", "it must be int | None"]),
        ("Norm->Attn(window=0)->+", ["window=0", "at least 1"]),
        ("Norm->Attn(num_kv_heads=3)->+", ["num_kv_heads=3", "num_heads=4"]),
    ],
)
def test_unknown_blocks_and_options_list_those_there_are(layer, words):
    one_line_error(lambda: build_model(replace(TINY, layers=layer), V), *words)


def test_the_base_model_alone_knows_the_base_blocks():
    tokens = some_tokens(2, 9)
    torch.manual_seed(0)
    alone = GPT(TINY, V)
    torch.manual_seed(0)
    assert build_model(TINY, V)(tokens)[0].equal(alone(tokens)[0])
    one_line_error(lambda: GPT(replace(TINY, layers="Norm->ShortConv->+"), V), "»ShortConv«", "There are: Attn, MLP, RMSNorm")


PLUGIN = """
import torch
from torch import nn

class Mean(nn.Module):
    '''The mean of the story so far, with values of the config and of the layer string.'''

    def __init__(self, dim: int, dropout: float, power: int = 1):
        super().__init__()
        self.w_out, self.dropout, self.power = nn.Linear(dim, dim), dropout, power

    def forward(self, x, *, story_start, rope):
        B, T, D = x.shape
        self.rope = rope
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        mask = mask if story_start is None else mask & (torch.arange(T) >= story_start[..., None])
        return self.w_out((mask / mask.sum(-1, keepdim=True)) @ x) ** self.power

BLOCKS = {"Mean": Mean}
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """plugin(source) writes a plugin and returns a config that names it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str, **options) -> ModelConfig:
        sys.modules.pop("an_idea", None)  # of another test
        (tmp_path / "an_idea.py").write_text(source, encoding="utf-8")
        return replace(TINY, plugins=("an_idea",), **options)

    yield write
    sys.modules.pop("an_idea", None)


def test_a_block_of_a_plugin_gets_the_arguments_it_names(plugin):
    config = plugin(PLUGIN, layers="Norm->Mean(power=2)->+->Norm->MLP->+", dropout=0.125)
    model, tokens = build(config), some_tokens(2, 10)
    mean = model.layers[0].branches[0].blocks[1]
    assert (type(mean).__name__, mean.dropout, mean.power, mean.w_out.weight.shape) == ("Mean", 0.125, 2, (24, 24))
    story_ids = torch.tensor([[0] * 4 + [1] * 6] * 2)
    packed, _ = model(tokens, story_ids=story_ids)
    torch.testing.assert_close(packed[:, 4:], model(tokens[:, 4:])[0], atol=1e-5, rtol=1e-5)
    assert mean.rope[0].shape[-1] == 4
    one_line_error(lambda: build_model(replace(config, layers="Mena->+"), V), "'Mean'", "There are: Norm, Attn, MLP")


@pytest.mark.parametrize(
    "source, error, words",
    [
        (PLUGIN.replace('"Mean"', '"MLP"'), ValueError, ["'an_idea'", "'MLP'", "taken"]),
        (PLUGIN.replace('"Mean"', '"Norm"'), ValueError, ["'an_idea'", "'Norm'", "taken"]),
        (PLUGIN.replace("BLOCKS", "MENU"), ValueError, ["'an_idea'", "BLOCKS"]),
        (PLUGIN.replace("dropout: float", "num_experts: int"), ValueError, ["Mean", "'num_experts'", "Mean(num_experts=...)"]),
        ("import a_package_that_is_not_there", ImportError, ["a_package_that_is_not_there"]),
    ],
)
def test_a_plugin_that_does_not_fit_is_named(plugin, source, error, words):
    config = plugin(source, layers="Norm->Mean->+")
    one_line_error(lambda: build_model(config, V), *words, error=error)


def test_a_missing_plugin_is_named():
    one_line_error(lambda: build_model(replace(TINY, plugins=("nobodys_idea",)), V), "nobodys_idea", error=ImportError)


def test_residual_outputs_start_smaller_in_deeper_models():
    def std(num_layers, block, weight):
        torch.manual_seed(0)
        config = ModelConfig(num_layers=num_layers, layers=("Norm->Attn->+->Norm->MLP->+",))
        return getattr(build_model(config, V).layers[0].branches[0].blocks[block], weight).weight.std().item()

    for block in (1, 3):
        assert std(1, block, "w_out") / std(8, block, "w_out") == pytest.approx(math.sqrt(8), rel=0.03)
    assert std(1, 1, "w_q") == pytest.approx(std(8, 1, "w_q"), rel=0.03)
    branches = replace(TINY, num_layers=3, layers=["Norm->MLP->+->Norm->MLP->+", "Norm->MLP->+"])  # 9 residuals
    for name, weight in build_model(branches, V).named_parameters():
        if "w_out" in name:
            assert weight.std().item() == pytest.approx(0.02 / 3, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_new_model_guesses(name):
    torch.manual_seed(0)
    _, loss = build_model(PRESETS[name].model, V)(some_tokens(4, 64), some_tokens(4, 64, seed=1))
    assert loss.item() == pytest.approx(math.log(V), rel=0.5)


def test_tied_embeddings_are_one_table():
    tied, untied = build_model(TINY, V), build_model(replace(TINY, tied_embeddings=False), V)
    assert tied.head.weight is tied.embedding.weight and untied.head.weight is not untied.embedding.weight
    assert num_parameters(untied) - num_parameters(tied) == V * 24
    assert num_parameters(untied, embeddings=False) == num_parameters(tied, embeddings=False) == num_parameters(tied) - V * 24
    loaded = build_model(TINY, V)
    loaded.load_state_dict(tied.state_dict())
    assert loaded.head.weight is loaded.embedding.weight
    learned = build_model(replace(TINY, positions="learned"), V)
    assert num_parameters(learned) == num_parameters(tied) + 32 * 24
    assert num_parameters(learned, embeddings=False) == num_parameters(tied, embeddings=False)


@pytest.mark.parametrize("soft_cap", [None, 50.0], ids=["fused", "written out"])
def test_dropout_is_for_training_and_follows_the_seed(soft_cap):
    capped = replace(TINY, attention_soft_cap=soft_cap)
    model, without = build(replace(capped, dropout=0.3)), build(capped)
    tokens = some_tokens(2, 20)
    torch.testing.assert_close(model(tokens)[0], without(tokens)[0])
    model.train(), without.train()

    def seeded(seed):
        torch.manual_seed(seed)
        return model(tokens)[0]

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.allclose(seeded(1), seeded(2))
    torch.testing.assert_close(without(tokens)[0], without.eval()(tokens)[0])


def test_dropout_drops_its_share_of_embeddings_and_updates():
    model = build(replace(TINY, num_layers=1, layers="MLP->+", positions="none", dropout=0.3)).train()
    recorded = {}
    model.layers[0].register_forward_hook(lambda layer, inputs, output: recorded.update(x=inputs[0], y=output))
    tokens = torch.arange(V).repeat(64, 1)[:, :32]
    model(tokens)
    mlp = model.layers[0].branches[0].blocks[0]
    x, y = recorded["x"], recorded["y"]
    for dropped, whole in ((x, model.embedding(tokens)), (y - x, mlp(x))):
        is_kept = dropped.abs() > 1e-6
        assert is_kept.float().mean().item() == pytest.approx(0.7, abs=0.01)
        torch.testing.assert_close(dropped[is_kept], whole[is_kept] / 0.7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("soft_cap", [None, 50.0], ids=["fused", "written out"])
def test_dropout_keeps_the_expectation_of_attention(soft_cap):
    torch.manual_seed(0)
    attention, x = Attention(24, 4, 2, 8, attention_soft_cap=soft_cap, dropout=0.3), torch.randn(1, 6, 24)
    expected = attention.eval()(x)
    attention.train()
    mean = torch.stack([attention(x) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.03, rtol=0)


def test_soft_caps_bound():
    capped, free = build(replace(TINY, logit_soft_cap=0.5)), build(TINY)
    tokens = some_tokens(2, 20)
    logits = free(tokens)[0]
    assert logits.abs().max() > 0.6
    torch.testing.assert_close(capped(tokens)[0], 0.5 * torch.tanh(logits / 0.5))

    attention, x = Attention(24, 4, 2, 8, attention_soft_cap=1e-4), torch.randn(1, 6, 24) * 100
    expected = attention.w_v(x).cumsum(1) / torch.arange(1, 7).view(1, 6, 1)  # scores of about 0: the mean of all before
    expected = expected.view(1, 6, 2, 1, 8).expand(1, 6, 2, 2, 8).reshape(1, 6, 32)
    torch.testing.assert_close(attention(x), attention.w_out(expected), atol=0.05, rtol=0)


def test_logits_and_queries_may_have_a_scale():
    scaled, free = build(replace(TINY, logit_scale=0.3)), build(TINY)
    tokens = some_tokens(2, 20)
    torch.testing.assert_close(scaled(tokens)[0], 0.3 * free(tokens)[0])

    torch.manual_seed(0)
    x = torch.randn(2, 9, 24)
    default, scaled = Attention(24, 4, 2, 8), Attention(24, 4, 2, 8, query_scale=0.7)
    scaled.load_state_dict(default.state_dict())
    with torch.no_grad():
        default.w_q.weight.mul_(0.7 * math.sqrt(8))
    torch.testing.assert_close(scaled(x), default(x))
    one_line_error(lambda: Attention(24, 4, 2, 8, query_scale=0.0), "query_scale=0.0", "None")


@pytest.mark.parametrize("mask", [None, "boolean", "added"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_fused_attention_equals_the_written_out_one(num_kv_heads, mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8) for heads in (4, num_kv_heads, num_kv_heads))
    if mask is not None:
        mask = (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool) if mask == "boolean" else torch.randn(4, 9, 9)
    fused, written_out = (masked_attention(q, k, v, mask, soft_cap) for soft_cap in (None, 1e4))
    torch.testing.assert_close(fused, written_out, atol=1e-5, rtol=1e-5)


def test_zero_init_adds_nothing_and_predicts_all_alike():
    model = build_model(replace(TINY, zero_init=True, tied_embeddings=False), V)
    logits, loss = model(some_tokens(2, 9), some_tokens(2, 9, seed=1))
    assert not logits.any() and loss.item() == pytest.approx(math.log(V))


@pytest.mark.parametrize("own, window", [(None, 1), (None, 5), (5, None), (5, 3), (3, 5), (5, 1)])
@torch.no_grad()
def test_a_token_sees_the_narrower_window_and_its_own_story(own, window):
    """`own` is the window of the block, `window` the one that grows during training."""
    model, tokens = build(replace(TINY, num_layers=1, layers=f"Norm->Attn(window={own})->+->Norm->MLP->+")), some_tokens(2, 24)
    story_ids = torch.tensor([[0] * 10 + [1] * 14, [0] * 24])
    packed, _ = model(tokens, story_ids=story_ids, window=window)
    width = min(filter(None, (own, window)))
    for row, position, story_start in ((0, 23, 10), (0, 11, 10), (0, 3, 0), (1, 7, 0), (1, 23, 0)):
        earliest = max(story_start, position + 1 - width)
        alone, _ = model(tokens[row : row + 1, earliest : position + 1])
        torch.testing.assert_close(packed[row, position], alone[0, -1], atol=1e-5, rtol=1e-5)


def test_rope_sees_distances_only():
    """Later positions, all by the same number: other angles, the same scores."""
    model = build(replace(TINY, positions="rope"))
    rope = model.rope_cos, model.rope_sin
    block, x = model.layers[0].branches[0].blocks[1], torch.randn(1, 8, 24)
    early, late = (tuple(table[None, start : start + 8] for table in rope) for start in (0, 20))
    torch.testing.assert_close(block(x, rope=early), block(x, rope=late), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(block(x, rope=early), block(x, rope=None), atol=1e-3)


@pytest.mark.parametrize("positions", POSITIONS)
def test_more_tokens_than_the_context_are_an_error(positions):
    model = build(replace(TINY, positions=positions))
    assert model(some_tokens(1, 32))[0].shape == (1, 32, V)
    one_line_error(lambda: model(some_tokens(1, 33)), "33 tokens", "max_seq_len=32")
    cache = Cache()
    model(some_tokens(1, 30), cache=cache)
    one_line_error(lambda: model(some_tokens(1, 3), cache=cache), "33 tokens", "max_seq_len=32")


@pytest.mark.parametrize("config", [TINY, VARIANTS["soft_caps"], VARIANTS["parallel"], replace(TINY, layers=SANDWICH_NORM)])
def test_compile_needs_no_graph_break(config):
    model, tokens, story_ids = build(config), some_tokens(2, 20), torch.tensor([[0] * 7 + [1] * 13] * 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ids in (None, story_ids):
        expected = model(tokens, tokens, story_ids=ids)
        for ours, theirs in zip(compiled(tokens, tokens, story_ids=ids), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
