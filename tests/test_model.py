"""Promises of model.py: it computes what other people's implementations compute, and the layer string means what it says."""

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

from config import SANDWICH_NORM, ModelConfig
from model import GPT, IGNORE, MLP, Attention, Cache, Layer, Steps
from modules.norms import CosineNorm, LayerNorm, RMSNorm
from runs.presets import PRESETS, preset

V = 98
TINY = ModelConfig(dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=32)
POSITIONS = ("rope", "learned", "sinusoidal", "none")
VARIANTS = {
    **{positions: replace(TINY, positions=positions) for positions in POSITIONS},
    "plain": replace(TINY, attention="plain"),
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
    """Every weight away from where it begins, so that no gain of 1, no bias of 0 and no small matrix hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def build(config: ModelConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return randomised(GPT(config, V)).eval()


EVERY_MODEL = {name: model for name, (model, _) in PRESETS.items()} | VARIANTS

REFERENCES = {
    "llama3_like": (preset("llama3_like").model, references.llama),
    "llama3_like_plain": (replace(preset("llama3_like").model, attention="plain"), references.llama),
    "the_default": (ModelConfig(), references.llama),
    "gpt2_like": (preset("gpt2_like").model, references.gpt2),
    "gemma1_like": (preset("gemma1_like").model, references.gemma),
    "gemma2": (replace(preset("gemma2_like").model, layers=SANDWICH_NORM), references.gemma2),
}


@pytest.mark.parametrize("config, reference", REFERENCES.values(), ids=REFERENCES)
def test_logits_gradients_and_size_equal_transformers(config: ModelConfig, reference: Callable):
    torch.manual_seed(0)
    model = GPT(config, V).eval()
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
    for ours, their in ((model.embedding, theirs.get_input_embeddings()), (model.head, theirs.get_output_embeddings())):
        torch.testing.assert_close(ours.weight.grad, their.weight.grad, atol=1e-4, rtol=0)
    if reference is references.llama:
        their_gradients = {name: weight.grad for name, weight in theirs.named_parameters(remove_duplicate=False)}
        for name, weight in references.llama_names(model).items():
            torch.testing.assert_close(weight.grad, their_gradients[name], atol=1e-4, rtol=0)

    assert model.num_parameters() == theirs.num_parameters()
    tables = ("embed_tokens", "wte", "wpe", "lm_head")
    inside = [weight.numel() for name, weight in theirs.named_parameters() if name.split(".")[-2] not in tables]
    assert model.num_parameters(embeddings=False) == sum(inside)


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


def test_a_fresh_norm_gives_channels_of_size_one():
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


def test_the_loss_ignores_what_is_not_to_be_predicted_and_micro_batches_add_up():
    model = build(TINY)
    tokens, targets = some_tokens(6, 12), some_tokens(6, 12, seed=1)
    for row in range(6):
        targets[row, 2 * row :] = IGNORE
    logits, loss = model(tokens, targets)
    kept = targets != IGNORE
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None]).mean())
    expected = torch.autograd.grad(loss, list(model.parameters()))

    losses = [model(t, y)[1] * (y != IGNORE).sum() / kept.sum() for t, y in zip(tokens.split(4), targets.split(4), strict=True)]
    torch.testing.assert_close(sum(losses), loss)
    for whole, parts in zip(expected, torch.autograd.grad(sum(losses), list(model.parameters())), strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def steps(layer: str, config: ModelConfig = TINY) -> Steps:
    torch.manual_seed(0)
    return randomised(Steps(layer, config, num_residuals=1))


def by_hand(layer: str, x: torch.Tensor, blocks: list[Callable]) -> torch.Tensor:
    """What each layer string of the test below means, written out."""
    match layer, blocks:
        case "Norm->MLP->+->Norm->MLP->+", [n1, m1, n2, m2]:  # pre-norm
            h = x + m1(n1(x))
            return h + m2(n2(h))
        case "MLP->+->Norm->|->MLP->+->Norm", [m1, n1, m2, n2]:  # post-norm: the skip begins behind the norm
            h = n1(x + m1(x))
            return n2(h + m2(h))
        case "MLP->+->Norm->MLP->+", [m1, n1, m2]:  # without | the skip begins right behind +
            h = x + m1(x)
            return h + m2(n1(h))
        case "Norm->MLP->Norm->+", [n1, m1, n2]:  # sandwich
            return x + n2(m1(n1(x)))
        case "Norm->MLP", [n1, m1]:
            return m1(n1(x))
        case "MLP->|->MLP", [m1, m2]:  # a skip that no one adds
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
    module = steps(layer)
    torch.testing.assert_close(module(x), by_hand(layer, x, list(module.blocks)))


def test_a_list_of_strings_is_branches_side_by_side():
    x = torch.randn(2, 5, 24)
    torch.manual_seed(0)
    layer = randomised(Layer(["Norm->MLP->+->Norm->MLP->+", "Norm->MLP(gated=False)->+"], TINY, 1))
    n1, m1, n2, m2 = layer.branches[0].blocks
    n3, m3 = layer.branches[1].blocks
    dense = m1(n1(x)) + m2(n2(x + m1(n1(x))))
    torch.testing.assert_close(layer(x), x + dense + m3(n3(x)))


def test_a_tuple_of_layers_tiles_the_depth():
    config = replace(TINY, num_layers=4, layers=("Norm->Attn->+", ["Norm->MLP->+", "Norm->Attn->+"]))
    kinds = [[[type(b).__name__ for b in s.blocks] for s in layer.branches] for layer in GPT(config, V).layers]
    assert kinds == [[["RMSNorm", "Attention"]], [["RMSNorm", "MLP"], ["RMSNorm", "Attention"]]] * 2


def test_layers_without_a_skip_can_be_built():
    assert GPT(replace(TINY, layers="Norm->Attn->MLP"), V)(some_tokens(1, 4))[0].isfinite().all()


def test_options_in_the_string_win_over_the_config():
    attention_part = "LayerNorm(norm_bias=True)->Attn(num_kv_heads=1, qk_norm=True)->+"
    layer = f"{attention_part}->Norm->MLP(mlp_dim=64, gated=False, activation='ReLU')->+"
    norm, attention, default_norm, mlp = steps(layer, replace(TINY, norm="CosineNorm")).blocks
    assert isinstance(norm, LayerNorm) and norm.bias is not None
    assert isinstance(default_norm, CosineNorm) and default_norm.bias is None
    assert attention.w_k.weight.shape == (8, 24) and attention.q_norm is not None
    assert mlp.w_in.weight.shape == (64, 24) and mlp.w_gate is None
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(mlp(x), mlp.w_out(mlp.w_in(x).clamp(min=0)))


@pytest.mark.parametrize("mlp_dim", [24, 64, 100, 512, 1152])
def test_gating_keeps_the_number_of_parameters(mlp_dim):
    gated, plain = (sum(w.numel() for w in MLP(64, mlp_dim, gated=gated).parameters()) for gated in (True, False))
    assert abs(gated - plain) <= 3 * 64 * 4  # three matrices, to the nearest multiple of 8


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
def test_unknown_blocks_and_options_show_the_menu(layer, words):
    one_line_error(lambda: GPT(replace(TINY, layers=layer), V), *words)


PLUGIN = """
import torch
from torch import nn

class Mean(nn.Module):
    '''The mean of all tokens of the story so far, and whatever the config and the layer give.'''

    def __init__(self, dim: int, dropout: float, power: int = 1):
        super().__init__()
        self.w_out, self.dropout, self.power = nn.Linear(dim, dim), dropout, power

    def forward(self, x, *, first, rope):
        B, T, D = x.shape
        self.rope = rope
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        mask = mask if first is None else mask & (torch.arange(T) >= first[..., None])
        return self.w_out((mask / mask.sum(-1, keepdim=True)) @ x) ** self.power

BLOCKS = {"Mean": Mean}
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """plugin(source) writes a plugin, and gives the config that names it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str, **knobs) -> ModelConfig:
        sys.modules.pop("an_idea", None)  # of another test
        (tmp_path / "an_idea.py").write_text(source, encoding="utf-8")
        return replace(TINY, plugins=("an_idea",), **knobs)

    yield write
    sys.modules.pop("an_idea", None)


def test_a_plugin_gets_what_it_asks_for(plugin):
    config = plugin(PLUGIN, layers="Norm->Mean(power=2)->+->Norm->MLP->+", dropout=0.125)
    model, tokens = build(config), some_tokens(2, 10)
    mean = model.layers[0].branches[0].blocks[1]
    assert (type(mean).__name__, mean.dropout, mean.power, mean.w_out.weight.shape) == ("Mean", 0.125, 2, (24, 24))
    story_ids = torch.tensor([[0] * 4 + [1] * 6] * 2)
    packed, _ = model(tokens, story_ids=story_ids)
    torch.testing.assert_close(packed[:, 4:], model(tokens[:, 4:])[0], atol=1e-5, rtol=1e-5)
    assert mean.rope[0].shape[-1] == 4
    one_line_error(lambda: GPT(replace(config, layers="Mena->+"), V), "'Mean'", "There are: Norm, Attn, MLP")


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
    one_line_error(lambda: GPT(config, V), *words, error=error)


def test_a_plugin_that_is_not_there_is_named():
    one_line_error(lambda: GPT(replace(TINY, plugins=("nobodys_idea",)), V), "nobodys_idea", error=ImportError)


def test_residual_outputs_begin_smaller_the_deeper_the_model():
    def std(num_layers, block, weight):
        torch.manual_seed(0)
        config = ModelConfig(num_layers=num_layers, layers=("Norm->Attn->+->Norm->MLP->+",))
        return getattr(GPT(config, V).layers[0].branches[0].blocks[block], weight).weight.std().item()

    for block in (1, 3):
        assert std(1, block, "w_out") / std(8, block, "w_out") == pytest.approx(math.sqrt(8), rel=0.03)
    assert std(1, 1, "w_q") == pytest.approx(std(8, 1, "w_q"), rel=0.03)
    branches = replace(TINY, num_layers=3, layers=["Norm->MLP->+->Norm->MLP->+", "Norm->MLP->+"])  # 9 times +
    for name, weight in GPT(branches, V).named_parameters():
        if "w_out" in name:
            assert weight.std().item() == pytest.approx(0.02 / 3, rel=0.1)


def test_a_fresh_model_guesses():
    for name, (config, _) in PRESETS.items():
        torch.manual_seed(0)
        _, loss = GPT(config, V)(some_tokens(4, 64), some_tokens(4, 64, seed=1))
        assert loss.item() == pytest.approx(math.log(V), rel=0.5), name


def test_tied_embeddings_are_one_table():
    tied, untied = GPT(TINY, V), GPT(replace(TINY, tied_embeddings=False), V)
    assert tied.head.weight is tied.embedding.weight and untied.head.weight is not untied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == V * 24
    assert untied.num_parameters(embeddings=False) == tied.num_parameters(embeddings=False) == tied.num_parameters() - V * 24
    again = GPT(TINY, V)
    again.load_state_dict(tied.state_dict())
    assert again.head.weight is again.embedding.weight
    learned = GPT(replace(TINY, positions="learned"), V)
    assert learned.num_parameters() == tied.num_parameters() + 32 * 24
    assert learned.num_parameters(embeddings=False) == tied.num_parameters(embeddings=False)


@pytest.mark.parametrize("attention", ["auto", "plain"])
def test_dropout_is_for_training_and_follows_the_seed(attention):
    model, without = build(replace(TINY, dropout=0.3, attention=attention)), build(replace(TINY, attention=attention))
    tokens = some_tokens(2, 20)
    torch.testing.assert_close(model(tokens)[0], without(tokens)[0])
    model.train(), without.train()

    def seeded(seed):
        torch.manual_seed(seed)
        return model(tokens)[0]

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.allclose(seeded(1), seeded(2))
    torch.testing.assert_close(without(tokens)[0], without.eval()(tokens)[0])


def test_dropout_takes_its_share_of_embeddings_and_residual_updates():
    model = build(replace(TINY, num_layers=1, layers="MLP->+", positions="none", dropout=0.3)).train()
    seen = {}
    model.layers[0].register_forward_hook(lambda layer, inputs, output: seen.update(x=inputs[0], y=output))
    tokens = torch.arange(V).repeat(64, 1)[:, :32]
    model(tokens)
    mlp = model.layers[0].branches[0].blocks[0]
    for dropped, whole in ((seen["x"], model.embedding(tokens)), (seen["y"] - seen["x"], mlp(seen["x"]))):
        kept = dropped.abs() > 1e-6
        assert kept.float().mean().item() == pytest.approx(0.7, abs=0.01)
        torch.testing.assert_close(dropped[kept], whole[kept] / 0.7, atol=1e-5, rtol=1e-4)


def test_dropout_keeps_the_expectation_of_attention():
    torch.manual_seed(0)
    attention, x = Attention(24, 4, 2, 8, attention="plain", dropout=0.3), torch.randn(1, 6, 24)
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
    as_ever, scaled = Attention(24, 4, 2, 8), Attention(24, 4, 2, 8, query_scale=0.7)
    scaled.load_state_dict(as_ever.state_dict())
    with torch.no_grad():
        as_ever.w_q.weight.mul_(0.7 * math.sqrt(8))
    torch.testing.assert_close(scaled(x), as_ever(x))
    one_line_error(lambda: Attention(24, 4, 2, 8, query_scale=0.0), "query_scale=0.0", "None")


def test_fused_attention_equals_the_written_out_one():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 24)
    for num_kv_heads in (1, 2, 4):
        fused, plain = (Attention(24, 4, num_kv_heads, 8, attention=attention) for attention in ("auto", "plain"))
        plain.load_state_dict(fused.state_dict())
        torch.testing.assert_close(fused(x), plain(x), atol=1e-6, rtol=1e-5)


def test_a_model_that_begins_at_zero_adds_nothing_and_knows_nothing():
    model = GPT(replace(TINY, zero_init=True, tied_embeddings=False), V)
    logits, loss = model(some_tokens(2, 9), some_tokens(2, 9, seed=1))
    assert not logits.any() and loss.item() == pytest.approx(math.log(V))


@pytest.mark.parametrize("window", [1, 5])
def test_a_window_is_how_far_back_a_token_may_look(window):
    model, tokens = build(replace(TINY, num_layers=1)), some_tokens(2, 24)
    stories = torch.tensor([[0] * 10 + [1] * 14, [0] * 24])
    seen, _ = model(tokens, story_ids=stories, window=window)
    for row, place, first in ((0, 23, 24 - window), (0, 11, max(10, 12 - window)), (1, 7, 8 - window)):
        alone, _ = model(tokens[row : row + 1, first : place + 1])
        torch.testing.assert_close(seen[row, place], alone[0, -1], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_and_chunks_of_the_loss_change_nothing_but_the_memory():
    """Against the model that keeps everything."""
    tokens, stories = some_tokens(3, 21), torch.tensor([[0] * 8 + [1] * 12]).expand(3, 20)
    targets = tokens[:, 1:].masked_fill(some_tokens(3, 20, seed=2) < 20, IGNORE)
    for config in (VARIANTS["modules"], VARIANTS["soft_caps"]):
        model = build(config).train()
        gradients = []
        for model.checkpoint_layers, model.loss_chunk in ((False, None), (True, None), (False, 7), (True, 64)):
            model.zero_grad()
            _, loss = model(tokens[:, :-1], targets, story_ids=stories)
            loss.backward()
            gradients.append([loss.detach(), *(weight.grad for weight in model.parameters())])
        for other in gradients[1:]:
            torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def test_rope_sees_distances_only():
    """Later positions, by the same number for all: other angles, the same scores."""
    model = build(replace(TINY, positions="rope"))
    rope = model.rope_cos, model.rope_sin
    block, x = model.layers[0].branches[0].blocks[1], torch.randn(1, 8, 24)
    here, there = (tuple(table[None, start : start + 8] for table in rope) for start in (0, 20))
    torch.testing.assert_close(block(x, rope=here), block(x, rope=there), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(block(x, rope=here), block(x, rope=None), atol=1e-3)


@pytest.mark.parametrize("positions", POSITIONS)
def test_more_than_the_context_is_named(positions):
    model = build(replace(TINY, positions=positions))
    assert model(some_tokens(1, 32))[0].shape == (1, 32, V)
    one_line_error(lambda: model(some_tokens(1, 33)), "33 tokens", "max_seq_len=32")
    cache = Cache()
    model(some_tokens(1, 30), cache=cache)
    one_line_error(lambda: model(some_tokens(1, 3), cache=cache), "33 tokens", "max_seq_len=32")


@pytest.mark.parametrize("config", [TINY, VARIANTS["soft_caps"], VARIANTS["parallel"], replace(TINY, layers=SANDWICH_NORM)])
def test_compile_needs_no_break(config):
    model, tokens, story_ids = build(config), some_tokens(2, 20), torch.tensor([[0] * 7 + [1] * 13] * 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ids in (None, story_ids):
        expected = model(tokens, tokens, story_ids=ids)
        for ours, theirs in zip(compiled(tokens, tokens, story_ids=ids), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
