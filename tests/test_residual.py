"""Promises of modules/residual.py, and of the layer strings that place the norms."""

import itertools
from dataclasses import replace

import pytest
import torch
from errors import one_line_error
from gradient_checkpointing import check_gradient_checkpointing

from config import PRE_NORM, SANDWICH_NORM, ModelConfig
from conftest import MODEL
from model import GPT, MLP, Attention, Cache, RMSNorm
from modules.norms import DynamicTanh
from modules.registry import build_branch, build_model
from modules.residual import HyperRead

D = MODEL.dim
POST_NORM = "Attn->+->Norm->|->MLP->+->Norm"
PERI_NORM = SANDWICH_NORM  # with "Norm->|->" before the first layer, which norms the embeddings (arXiv 2502.02732, section 3)
# For two layers: the first half of a deeper model repeats the first of them, the second half the second.
U_NET = (f"{PRE_NORM}->SkipOut", f"SkipIn->|->{PRE_NORM}")
HYPER_CONNECTIONS = "HyperRead->Norm->Attn->HyperWrite->HyperRead->Norm->MLP->HyperWrite"


def randomised(model):
    """Add noise to every weight, so that no gain of 1 and no zero hides a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


def layers_of(model: GPT) -> list[list[torch.nn.Module]]:
    return [list(layer.branches[0].blocks) for layer in model.layers]


class TestPlaceOfNorms:
    """The formulas of the papers; f is attention or MLP."""

    @pytest.mark.parametrize(
        "layer, formula",
        [
            (PRE_NORM, lambda x, f, before, after: x + f(before(x))),
            (POST_NORM, lambda x, f, before, after: after(x + f(x))),
            (SANDWICH_NORM, lambda x, f, before, after: x + after(f(before(x)))),
            (PERI_NORM, lambda x, f, before, after: x + after(f(before(x)))),
        ],
        ids=["pre", "post", "sandwich", "peri"],
    )
    def test_formula(self, layer, formula):
        torch.manual_seed(0)
        branch, x = randomised(build_branch(layer, MODEL, 50)), torch.randn(2, 6, D)
        functions = [block for block in branch.blocks if isinstance(block, Attention | MLP)]
        norms = [block for block in branch.blocks if isinstance(block, RMSNorm)]
        y = x
        for number, f in enumerate(functions):
            around = norms[len(norms) // 2 * number :][: len(norms) // 2]
            y = formula(y, f, around[0], around[-1])
        torch.testing.assert_close(branch(x), y)

    def test_peri_norm_with_normed_embeddings(self):
        torch.manual_seed(0)
        model = randomised(build_model(replace(MODEL, num_layers=2, layers=(f"Norm->|->{PERI_NORM}", PERI_NORM)), 50))
        tokens = torch.randint(50, (2, 6))
        (first, *rest), second = layers_of(model)
        x = first(model.embedding(tokens))
        for norm_1, f, norm_2 in (rest[:3], rest[3:], second[:3], second[3:]):
            x = x + norm_2(f(norm_1(x)))
        without_rope = replace(model.config, positions="none")
        plain = build_model(without_rope, 50).eval()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(plain(tokens)[0], model.head(model.norm(x)))

    @pytest.mark.parametrize("options", [{}, {"norm_bias": True}, {"norm_affine": False}])
    def test_dynamic_tanh(self, options):
        norm = randomised(DynamicTanh(D, **options))
        x = torch.randn(2, 5, D) * 3
        expected = torch.tanh(norm.alpha * x)
        expected = expected if norm.weight is None else norm.weight * expected
        expected = expected if norm.bias is None else expected + norm.bias
        torch.testing.assert_close(norm(x), expected)
        assert DynamicTanh(D).alpha == 0.5 and DynamicTanh(D, alpha=0.8).alpha.item() == pytest.approx(0.8)
        (block,) = build_branch("Norm(alpha=0.7)", replace(MODEL, norm="DynamicTanh"), 50).blocks
        assert isinstance(block, DynamicTanh) and block.alpha.item() == pytest.approx(0.7)


class TestUNet:
    def test_the_last_skip_out_goes_to_the_first_skip_in(self):
        torch.manual_seed(0)
        layers = (U_NET[0], U_NET[0], PRE_NORM, U_NET[1], U_NET[1])
        model = randomised(build_model(replace(MODEL, num_layers=5, layers=layers, positions="none"), 50))
        tokens = torch.randint(50, (2, 7))
        x, skips = model.embedding(tokens), []
        for blocks, layer in zip(layers_of(model), layers, strict=True):
            if layer == U_NET[1]:
                skip_in, *blocks = blocks
                x = x + skip_in.weight * skips.pop()
            norm_1, attention, norm_2, mlp, *_ = blocks
            x = x + attention(norm_1(x))
            x = x + mlp(norm_2(x))
            if layer == U_NET[0]:
                skips.append(x)
        torch.testing.assert_close(model(tokens)[0], model.head(model.norm(x)), atol=1e-4, rtol=1e-4)

    def test_with_a_weight_of_zero_it_is_pre_norm(self):
        torch.manual_seed(0)
        plain, skips = (build_model(replace(MODEL, num_layers=2, layers=layers), 50).eval() for layers in (PRE_NORM, U_NET))
        copy_blocks(plain, skips)
        skip_in = skips.layers[1].branches[0].blocks[0]
        assert skip_in.weight == 1
        skip_in.weight.data.zero_()
        tokens = torch.randint(50, (2, 7))
        torch.testing.assert_close(skips(tokens)[0], plain(tokens)[0])

    def test_skips_must_pair(self):
        model = build_model(replace(MODEL, num_layers=1, layers="SkipOut->MLP->SkipIn->SkipIn"), 50)
        one_line_error(lambda: model(torch.zeros(1, 3, dtype=torch.long)), "SkipIn finds nothing", "as many SkipOut")


def copy_blocks(plain: GPT, other: GPT):
    """Copy the weights of a PRE_NORM model to another one with the same norms, attention and MLPs."""
    for name in ("embedding", "norm", "head"):
        getattr(other, name).load_state_dict(getattr(plain, name).state_dict())
    for blocks, others in zip(layers_of(plain), layers_of(other), strict=True):
        others = [block for block in others if isinstance(block, Attention | MLP | RMSNorm)]
        for block, copy in zip(blocks, others, strict=True):
            copy.load_state_dict(block.state_dict())


def slow_hyper_connections(model: GPT, tokens):
    """Token by token with the matrices of the paper: H (n, D), and HC of equation 1 for each pair of read and write."""
    embedded = model.embedding(tokens)
    B, T, _ = embedded.shape
    hidden = {(b, t): None for b in range(B) for t in range(T)}
    for b, t in hidden:
        n = model.layers[0].branches[0].blocks[0].streams
        hidden[b, t] = embedded[b, t].repeat(n, 1)  # (n, D)
    for blocks in layers_of(model):
        for read, norm, f, _ in (blocks[:4], blocks[4:]):
            given, mixed, written = torch.zeros(B, T, D), {}, {}
            for place, H in hidden.items():
                n = len(H)
                A_m, A_r, B_w = read.bias[:, :1], read.bias[:, 1 : n + 1], read.bias[:, n + 1 :].T
                if read.w_dynamic is not None:  # section 2.2
                    s_alpha, s_beta = read.scale
                    W_m, W_r, W_beta = read.w_dynamic.weight.T.split([1, n, 1], dim=1)
                    normed = read.norm(H)
                    B_w = B_w + s_beta * torch.tanh(normed @ W_beta).T
                    A_m = A_m + s_alpha * torch.tanh(normed @ W_m)
                    A_r = A_r + s_alpha * torch.tanh(normed @ W_r)
                given[place] = (A_m.T @ H)[0]
                mixed[place], written[place] = A_r.T @ H, B_w
            update = f(norm(given))
            hidden = {place: written[place].T @ update[place][None] + mixed[place] for place in hidden}  # equation 2
    x = torch.stack([torch.stack([hidden[b, t].mean(dim=0) for t in range(T)]) for b in range(B)])
    return model.head(model.norm(x))


class TestHyperConnections:
    @pytest.mark.parametrize("options", ["", "(streams=2)", "(dynamic=False)", "(streams=1)", "(streams=3, stream=2)"])
    def test_are_the_equations_of_the_paper(self, options):
        torch.manual_seed(0)
        layers = HYPER_CONNECTIONS.replace("HyperRead", f"HyperRead{options}")
        model = randomised(build_model(replace(MODEL, num_layers=2, layers=layers, positions="none"), 50))
        tokens = torch.randint(50, (2, 5))
        torch.testing.assert_close(model(tokens)[0], slow_hyper_connections(model, tokens), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("options", ["", "(dynamic=False)", "(streams=1)"])
    def test_start_as_a_pre_norm_residual(self, options):
        torch.manual_seed(0)
        layers = HYPER_CONNECTIONS.replace("HyperRead", f"HyperRead{options}")
        plain, hyper = (build_model(replace(MODEL, num_layers=3, layers=layers), 50).eval() for layers in (PRE_NORM, layers))
        copy_blocks(plain, hyper)
        tokens = torch.randint(50, (2, 7))
        torch.testing.assert_close(hyper(tokens)[0], plain(tokens)[0])

    def test_start_with_the_matrix_of_section_2_3(self):
        torch.manual_seed(0)
        bias = HyperRead(D, streams=3, stream=1).bias
        expected = torch.tensor([[0.0, 1, 0, 0, 1], [1, 0, 1, 0, 1], [0, 0, 0, 1, 1]])  # one row per stream: A_m, A_r, B
        assert bias.equal(expected)
        streams = {HyperRead(D).bias[:, 0].argmax().item() for _ in range(40)}
        assert streams == {0, 1, 2, 3}

    @pytest.mark.parametrize("reads, is_different", [((0, 1, 2, 3), [True] * 6), ((0, 0, 0, 0), [True] * 3 + [False] * 3)])
    def test_streams_differ_once_layers_read_different_ones(self, reads, is_different):
        """Those that no layer reads at first stay equal: (1, 2), (1, 3) and (2, 3) in the second case."""
        torch.manual_seed(0)
        layers = "->".join(f"HyperRead(dynamic=False, stream={stream})->Norm->MLP->HyperWrite" for stream in reads)
        branch = build_branch(layers, MODEL, 50)
        for block in branch.blocks:
            if isinstance(block, MLP):
                randomised(block)
        optimizer = torch.optim.SGD(branch.parameters(), lr=0.1)
        for _ in range(10):
            shared, x = {}, torch.randn(2, 6, D)
            (branch(x, shared=shared) - x.flip(-1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        streams = shared["streams"].unbind(dim=2)
        differs = [(one - other).abs().max().item() > 1e-4 for one, other in itertools.combinations(streams, 2)]
        assert differs == is_different

    def test_dropout_is_that_of_residual_updates(self):
        torch.manual_seed(0)
        layers = "HyperRead(streams=1, dynamic=False)->Norm->MLP->HyperWrite"
        config = replace(MODEL, dropout=0.5)
        hyper, plain = (build_branch(layer, config, 50) for layer in (layers, "Norm->MLP->+"))
        for block, copy in zip(plain.blocks, hyper.blocks[1:3], strict=True):
            copy.load_state_dict(block.state_dict())
        x = torch.randn(2, 6, D)
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        torch.testing.assert_close(hyper(x, shared={}), expected)
        assert not torch.allclose(plain.eval()(x), expected)

    def test_weight_decay_leaves_the_matrix_alone(self, make_config):
        from training.optim import build_optimizers

        model = build_model(replace(MODEL, layers=HYPER_CONNECTIONS), 50)
        undecayed, _, decayed = build_optimizers(model, make_config())[0].param_groups
        read = model.layers[0].branches[0].blocks[0]
        assert undecayed["weight_decay"] == 0 and any(weight is read.bias for weight in undecayed["params"])
        assert decayed["weight_decay"] > 0 and any(weight is read.w_dynamic.weight for weight in decayed["params"])

    @pytest.mark.parametrize(
        "layers, problem",
        [
            ("HyperRead->MLP->HyperWrite->HyperRead(streams=2)->MLP->HyperWrite", "HyperRead(streams=2) finds 4 streams"),
            ("HyperRead->HyperRead->MLP->HyperWrite", "a HyperRead comes before the HyperWrite of the one before it"),
            ("MLP->HyperWrite", "a HyperWrite has no HyperRead before it"),
        ],
    )
    def test_reads_and_writes_must_pair(self, layers, problem):
        model = build_model(replace(MODEL, layers=layers), 50)
        one_line_error(lambda: model(torch.zeros(1, 3, dtype=torch.long)), problem)

    @pytest.mark.parametrize("options, problem", [("streams=0", "at least 1"), ("stream=4", "there are 4, so give 0 to 3")])
    def test_bad_options_are_marked_in_the_layer_string(self, options, problem):
        layers = f"HyperRead({options})->MLP->HyperWrite"
        one_line_error(lambda: build_model(replace(MODEL, layers=layers), 50), f"»HyperRead({options})«->MLP", problem)


@pytest.mark.parametrize("layers", [U_NET, HYPER_CONNECTIONS, ("SkipOut->" + HYPER_CONNECTIONS, HYPER_CONNECTIONS + "->SkipIn")])
class TestBothInAModel:
    def test_token_by_token_equals_at_once(self, layers):
        torch.manual_seed(0)
        model = randomised(build_model(replace(MODEL, num_layers=4, layers=layers), 50))
        tokens, cache = torch.randint(50, (1, 9)), Cache()
        logits = [model(tokens[:, t : t + 1], cache=cache)[0] for t in range(9)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens)[0], atol=1e-4, rtol=1e-4)

    def test_gradient_checkpointing_gives_the_same_gradients(self, layers):
        torch.manual_seed(0)
        model = randomised(build_model(replace(MODEL, num_layers=4, layers=layers, dropout=0.2), 50)).train()
        tokens = torch.randint(50, (2, 9))
        check_gradient_checkpointing(model, tokens)

    def test_compiled_layers_give_the_same(self, layers):
        """Traced as for torch.compile, but without a compiler."""
        torch.manual_seed(0)
        model = randomised(build_model(replace(MODEL, num_layers=4, layers=layers), 50)).train()
        tokens = torch.randint(50, (2, 9))
        expected = model(tokens)[0]
        for layer in model.layers:
            layer.compile(backend="eager", dynamic=False)
        torch.testing.assert_close(model(tokens)[0], expected)
        torch._dynamo.reset()


def test_a_run_with_hyper_connections_learns_and_loads(make_config):
    from inference import load_model
    from train import train

    config = ModelConfig(**{**vars(MODEL), "layers": HYPER_CONNECTIONS})
    records = list(train(config, make_config(lr_max=3e-3, gradient_checkpointing=True), "hyper"))
    assert records[-1].train_loss < records[0].train_loss - 0.3
    model, _ = load_model("hyper")
    assert model(torch.zeros(1, 5, dtype=torch.long))[0].isfinite().all()
