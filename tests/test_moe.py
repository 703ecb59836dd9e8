"""Promises of modules/moe.py: the formulas, in a slow loop and by transformers; balance, capacity, and the report."""

import math
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from gradient_checkpointing import check_gradient_checkpointing
from torch.utils.flop_counter import FlopCounterMode

import fast
from config import ModelConfig, TrainConfig
from conftest import MODEL
from inference import load_model
from model import MLP, Cache
from modules.contract import check_block
from modules.moe import MoE
from modules.registry import build_branch, build_model
from runs.command_line import Arguments
from runs.folder import Run
from train import main, train
from training.configure import configure_for_training
from training.optim import Muon, build_optimizers, step_optimizers
from training.report import dead_experts

D, WIDTH = 16, 24
TINY = replace(MODEL, layers="Norm->Attn->+->Norm->MoE(num_experts=4)->+")

VARIANTS = {
    "mixtral": {},
    "grok": {"renormalise": False, "activation": "GELU"},
    "switch": {"top_k": 1, "renormalise": False, "gated": False, "activation": "ReLU"},
    "deepseek": {"scores": "sigmoid", "bias_rate": 0.001, "routed_scale": 2.5, "shared_experts": 2},
    "qwen3_next": {"shared_experts": 1, "shared_gate": True},
    "biases": {"linear_bias": True, "num_experts": 6, "top_k": 6},
    "capacity": {"capacity": 0.5},
    "one_place": {"capacity": 0.01, "linear_bias": True},
}


def make(**options) -> MoE:
    """A small MoE with large weights and biases."""
    torch.manual_seed(0)
    moe = MoE(dim=D, mlp_dim=WIDTH, **options)
    with torch.no_grad():
        for weight in moe.parameters():
            weight.normal_(std=0.3)
        if moe.selection_bias is not None:
            moe.selection_bias.normal_(std=0.3)
    return moe


def slow(moe: MoE, x, capacity=None):
    """Token by token and expert by expert, as in the papers."""
    y = torch.zeros_like(x)
    E, k = len(moe.uses), moe.top_k
    for row in range(x.shape[0]):
        taken = [0] * E
        for t in range(x.shape[1]):
            token = x[row, t]
            logits = moe.w_router.weight @ token
            scores = logits.exp() / logits.exp().sum() if moe.scores == "softmax" else 1 / (1 + (-logits).exp())
            biased = scores if moe.selection_bias is None else scores + moe.selection_bias
            chosen = sorted(range(E), key=lambda e: -biased[e].item())[:k]
            total = sum(scores[e] for e in chosen)
            for e in chosen:
                taken[e] += 1
                if capacity is not None and taken[e] > max(1, math.ceil(capacity * k * x.shape[1] / E)):
                    continue
                weight = moe.routed_scale * (scores[e] / total if moe.renormalise else scores[e])
                y[row, t] = y[row, t] + weight * expert(moe, e)(token[None, None])[0, 0]
            if moe.shared_mlp is not None:
                gate = 1 / (1 + (-moe.w_shared_gate.weight @ token).exp()) if moe.w_shared_gate is not None else 1
                y[row, t] = y[row, t] + gate * moe.shared_mlp(token[None, None])[0, 0]
    return y


def expert(moe: MoE, e: int) -> MLP:
    """One of the experts as an MLP of the base model."""
    experts = moe.experts
    mlp = MLP(D, WIDTH, experts.activation, experts.w_gate is not None, experts.w_in.bias is not None)
    mlp.load_state_dict({name: weight[e] for name, weight in experts.state_dict().items()})
    return mlp


class TestFormula:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_is_the_slow_loop_in_eval_and_in_training(self, variant):
        moe, x = make(**VARIANTS[variant]), torch.randn(3, 11, D)
        torch.testing.assert_close(moe.eval()(x), slow(moe, x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(moe.train()(x), slow(moe, x, moe.capacity), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("variant", ["mixtral", "deepseek", "biases", "capacity"])
    def test_gradients_are_those_of_dense_experts(self, variant):
        """Every expert for every token, weighted by 0 where it was not chosen."""
        moe, x = make(**VARIANTS[variant] | {"balance_loss": 0.0}), torch.randn(2, 9, D, requires_grad=True)
        direction = torch.randn(2, 9, D)
        logits = moe.w_router(x)
        scores = logits.softmax(-1) if moe.scores == "softmax" else logits.sigmoid()
        chosen = (scores if moe.selection_bias is None else scores + moe.selection_bias).topk(moe.top_k).indices
        picked = torch.zeros_like(scores).scatter(2, chosen, 1.0)
        weights = scores * picked
        if moe.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if moe.capacity is not None:
            weights = weights * (picked.cumsum(1) <= math.ceil(moe.capacity * moe.top_k * 9 / len(moe.uses)))
        experts = [dict(zip(moe.experts.state_dict(), parts, strict=True))
                   for parts in zip(*(weight.unbind() for weight in moe.experts.parameters()), strict=True)]  # fmt: skip
        outputs = [torch.func.functional_call(expert(moe, e), weights_of_e, x) for e, weights_of_e in enumerate(experts)]
        expected = moe.routed_scale * sum(weights[..., e, None] * output for e, output in enumerate(outputs))
        if moe.shared_mlp is not None:
            expected = expected + moe.shared_mlp(x) * (1 if moe.w_shared_gate is None else moe.w_shared_gate(x).sigmoid())
        leaves = [x, *moe.parameters()]
        slow_gradients = torch.autograd.grad((expected * direction).sum(), leaves)
        for ours, theirs in zip(torch.autograd.grad((moe(x) * direction).sum(), leaves), slow_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    def test_experts_of_one_kind_are_one_mlp(self):
        moe, x = make(), torch.randn(2, 5, D)
        for layer in (moe.experts.w_gate, moe.experts.w_in, moe.experts.w_out):
            layer.weight.data[:] = layer.weight.data[:1]
        torch.testing.assert_close(moe(x), expert(moe, 0)(x), atol=1e-5, rtol=1e-5)

    def test_starts_as_the_base_mlp_does(self):
        torch.manual_seed(0)
        (moe,) = build_branch("MoE(num_experts=64, shared_experts=8)", ModelConfig(dim=64), 50).blocks
        (mlp,) = build_branch("MLP", ModelConfig(dim=64), 50).blocks
        for part in (moe.experts, moe.shared_mlp):
            for name in ("w_gate", "w_in", "w_out"):
                assert getattr(part, name).weight.std().item() == pytest.approx(getattr(mlp, name).weight.std().item(), rel=0.05)
        width = mlp.w_in.out_features
        assert moe.experts.w_in.weight.shape[1] == width and moe.shared_mlp.w_in.out_features == 8 * width

    def test_work_is_that_of_the_chosen_experts(self):
        moe = make(num_experts=8, top_k=2, shared_experts=1).eval()
        with FlopCounterMode(display=False) as counter:
            moe(torch.randn(2, 7, D))
        assert counter.get_total_flops() == 2 * 14 * (D * 8 + 3 * 3 * D * WIDTH)  # router; 2 of 8, and the shared one

    def test_noise_is_in_training_only_and_of_the_right_size(self):
        x = torch.randn(1, 4000, D)
        for noise in (0.7, "learned"):
            moe = make(noise=noise)
            torch.testing.assert_close(moe.eval().route(x), moe.w_router(x))
            off = moe.train().route(x) - moe.w_router(x)
            deviation = 0.7 if noise != "learned" else F.softplus(x @ moe.w_noise.weight.T)
            noise = off / deviation
            assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)


class TestOriginals:
    def test_mixtral(self):
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        moe, x = make(num_experts=8, top_k=2).eval(), torch.randn(2, 13, D)
        config = MixtralConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=8)  # 2 of them
        config._experts_implementation = "eager"
        theirs = MixtralSparseMoeBlock(config).eval()
        theirs.load_state_dict({"gate.weight": moe.w_router.weight, **stacked(moe)})
        torch.testing.assert_close(moe(x), theirs(x), atol=1e-5, rtol=1e-5)

    def test_deepseek_v3(self):
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

        moe = make(num_experts=8, top_k=3, shared_experts=2, scores="sigmoid", bias_rate=0.001, routed_scale=2.5).eval()
        x = torch.randn(2, 13, D)
        config = DeepseekV3Config(
            hidden_size=D, moe_intermediate_size=WIDTH, n_routed_experts=8, num_experts_per_tok=3,
            n_shared_experts=2, n_group=1, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True, hidden_act="silu",
        )  # fmt: skip
        config._experts_implementation = "eager"
        theirs = DeepseekV3MoE(config).eval()
        router = {"gate.weight": moe.w_router.weight, "gate.e_score_correction_bias": moe.selection_bias}
        theirs.load_state_dict({**router, **stacked(moe), **shared(moe)})
        torch.testing.assert_close(moe(x), theirs(x), atol=1e-5, rtol=1e-5)

    def test_deepseek_v2(self):
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe

        moe = make(num_experts=8, top_k=3, shared_experts=1, renormalise=False, routed_scale=1.5).eval()
        x = torch.randn(2, 13, D)
        config = DeepseekV2Config(
            hidden_size=D, moe_intermediate_size=WIDTH, n_routed_experts=8, num_experts_per_tok=3,
            n_shared_experts=1, routed_scaling_factor=1.5, topk_method="greedy", hidden_act="silu",
            num_attention_heads=4,
        )  # fmt: skip
        config._experts_implementation = "eager"
        theirs = DeepseekV2Moe(config).eval()
        theirs.load_state_dict({"gate.weight": moe.w_router.weight, **stacked(moe), **shared(moe)})
        torch.testing.assert_close(moe(x), theirs(x), atol=1e-5, rtol=1e-5)

    def test_the_balance_loss_is_that_of_mixtral(self):
        """Theirs is top_k times as large, since it counts each of the top_k choices as one."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        moe, layer_shared = make(balance_loss=0.5).train(), {"losses": defaultdict(float)}
        x = torch.randn(3, 20, D)
        moe(x, shared=layer_shared)
        theirs = load_balancing_loss_func((moe.w_router(x).flatten(0, 1),), num_experts=8, top_k=2)
        torch.testing.assert_close(layer_shared["losses"]["router_balance"], 0.5 * theirs / 2)


def stacked(moe: MoE) -> dict:
    experts = moe.experts
    gate_and_up = torch.cat([experts.w_gate.weight, experts.w_in.weight], dim=1)
    return {"experts.gate_up_proj": gate_and_up, "experts.down_proj": experts.w_out.weight}


def shared(moe: MoE) -> dict:
    names = {"gate_proj": "w_gate", "up_proj": "w_in", "down_proj": "w_out"}
    return {f"shared_experts.{theirs}.weight": getattr(moe.shared_mlp, ours).weight for theirs, ours in names.items()}


class TestBalance:
    def test_the_balance_loss_is_least_for_an_even_use(self):
        moe, chosen = make(num_experts=4, top_k=2, balance_loss=0.3), torch.arange(8).view(1, 4, 2) % 4
        even = torch.full((1, 4, 4), 0.25)
        torch.testing.assert_close(moe.losses(even.log(), even, chosen), {"router_balance": torch.tensor(0.3)})
        uneven = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 4, 4)
        losses = moe.losses(uneven, uneven, torch.arange(8).view(1, 4, 2) % 2)
        torch.testing.assert_close(losses, {"router_balance": torch.tensor(0.6)})

    def test_large_logits_cost_the_z_loss(self):
        moe, logits = make(balance_loss=0.0, z_loss=0.1), torch.randn(2, 3, 8)
        losses = moe.losses(logits, logits.softmax(-1), logits.topk(2).indices)
        torch.testing.assert_close(losses["router_z"], 0.1 * (logits.exp().sum(-1).log() ** 2).mean())

    def test_losses_are_added_in_training_only_chunked_or_not(self):
        torch.manual_seed(0)
        layers = [TINY.layers.replace("=4", f"=4, balance_loss={balance_loss}") for balance_loss in (0.0, 1.0)]
        free, costly = (build_model(replace(TINY, layers=layer), 50) for layer in layers)
        costly.load_state_dict(free.state_dict())
        tokens = torch.randint(50, (2, 20))
        for chunk in (None, 8):
            for model in (free, costly):
                fast.use(model, kernels=False, loss_chunk=chunk)
            assert costly.train()(tokens, tokens)[1] > free.train()(tokens, tokens)[1] + 0.9
        torch.testing.assert_close(costly.eval()(tokens, tokens)[1], free.eval()(tokens, tokens)[1])

    @pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
    @pytest.mark.parametrize("options", [{"balance_loss": 0.1}, {"balance_loss": 0.0, "bias_rate": 0.01, "scores": "sigmoid"}])
    def test_training_brings_unused_experts_back(self, options, optimizer, make_config):
        """The router starts with two experts only, which nothing else would change."""
        used = {}
        for name, given in {"balanced": options, "unbalanced": {"balance_loss": 0.0}}.items():
            torch.manual_seed(0)
            moe = MoE(dim=D, mlp_dim=WIDTH, num_experts=6, **given)
            model = torch.nn.ModuleList([moe, torch.nn.LayerNorm(D)])
            optimizers = build_optimizers(model, make_config(optimizer=optimizer))
            with torch.no_grad():
                moe.w_router.weight.normal_(std=0.3)
                moe.w_router.weight[2:, 0] = -1
            for step in range(100):
                if step == 70:
                    moe.report()
                x, shared = torch.randn(4, 16, D), {"losses": defaultdict(float)}
                x[..., 0] = 5
                y = moe(x, shared=shared)
                sum(shared["losses"].values(), y.square().mean()).backward()
                step_optimizers(model, optimizers)
            used[name] = moe.report()["least_used"]
        assert used["balanced"] > 0.1 and used["unbalanced"] < 0.02

    def test_the_bias_follows_the_sign_rule_and_is_saved(self):
        moe = make(num_experts=4, top_k=1, renormalise=False, bias_rate=0.25, scores="sigmoid").train()
        initial = moe.selection_bias.clone()
        moe.count(torch.tensor([[[0], [0], [0], [1]], [[0], [0], [1], [2]]]), None)  # 5, 2, 1 and 0; the mean is 2
        moe.after_step()
        torch.testing.assert_close(moe.selection_bias - initial, torch.tensor([-0.25, 0.0, 0.25, 0.25]))
        moe.after_step()  # no token since
        torch.testing.assert_close(moe.selection_bias - initial, torch.tensor([-0.25, 0.0, 0.25, 0.25]))
        assert "selection_bias" in moe.state_dict() and "selection_bias" not in dict(moe.named_parameters())
        moe.selection_bias[:] = torch.tensor([9.0, 0, 0, 0])
        x = torch.randn(1, 5, D)
        torch.testing.assert_close(moe.eval()(x), moe.w_router(x).sigmoid()[..., :1] * expert(moe, 0)(x))

    def test_a_bias_rate_of_0_keeps_the_bias(self):
        moe = make(bias_rate=0.0).train()
        initial = moe.selection_bias.clone()
        moe(torch.randn(2, 9, D))
        moe.after_step()
        assert moe.selection_bias.equal(initial) and not moe.uses_in_step.any()


class TestCapacity:
    def test_first_come_first_served_within_a_row(self):
        moe = make(num_experts=2, top_k=1, renormalise=False, capacity=0.5).train()  # 2 of 8 tokens each
        chosen = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 0]])[..., None]
        within = moe.within_capacity(chosen)[..., 0].int().tolist()
        assert within == [[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]]

    def test_dropped_tokens_keep_the_residual_stream(self):
        torch.manual_seed(0)
        layer = "MoE(num_experts=2, top_k=1, renormalise=False, capacity=0.2)->+"
        branch = build_branch(layer, replace(MODEL, dim=D), 50)
        x = torch.randn(1, 20, D)
        changed = (branch.train()(x) != x).any(dim=-1)
        assert 1 <= changed.sum() <= 4  # ceil(0.2 * 20 / 2) each
        assert branch.blocks[0].report()["dropped"] == pytest.approx(1 - changed.sum().item() / 20)
        assert (branch.eval()(x) != x).any(dim=-1).all()

    def test_more_than_enough_drops_nothing(self):
        moe, x = make(capacity=4.0), torch.randn(2, 30, D)  # 4 = num_experts / top_k
        torch.testing.assert_close(moe.train()(x), moe.eval()(x))
        assert moe.report()["dropped"] == 0

    def test_each_row_of_a_batch_has_its_own_capacity(self):
        moe, x = make(capacity=0.5).train(), torch.randn(3, 12, D)
        torch.testing.assert_close(moe(x), torch.cat([moe(row[None]) for row in x]))


class TestReport:
    def test_counts(self):
        moe = make(num_experts=4, top_k=2, capacity=1.0).train()
        moe.count(torch.tensor([[[0, 1], [0, 1], [0, 2], [1, 0]]]), torch.tensor([[[1, 1], [1, 1], [0, 1], [1, 0]]]).bool())
        assert moe.report() == {"least_used": 0.0, "most_used": 1.0, "dead_experts": 1, "dropped": 2 / 8}
        assert moe.report() == {}

    def test_shares_are_counted_in_training_checkpointed_or_not(self):
        torch.manual_seed(0)
        model, tokens = build_model(TINY, 50), torch.randint(50, (2, 30))
        moe = model.layers[0].branches[0].blocks[3]
        model.eval()(tokens)
        assert moe.report() == {}
        reports = []
        for checkpointing in (False, True):
            configure_for_training(model, TrainConfig(gradient_checkpointing=checkpointing))
            model.train()(tokens, tokens)[1].backward()
            reports.append(moe.report())
        assert reports[0] == reports[1] and 0 < reports[0]["least_used"] <= 0.5 <= reports[0]["most_used"] <= 1

    def test_blocks_csv_has_each_evaluation_once_after_a_resume(self, make_config):
        model = replace(TINY, layers=TINY.layers.replace("=4", "=4, scores='sigmoid', bias_rate=0.01"))
        for _ in train(model, make_config(), "whole"):
            pass
        for record in train(model, make_config(), "interrupted"):
            if record.step == 13:
                break
        for _ in train(model, make_config(), "interrupted", resume=True):
            pass
        whole, resumed = (pd.read_csv(Run(name).path("blocks.csv")) for name in ("whole", "interrupted"))
        pd.testing.assert_frame_equal(whole, resumed)
        assert list(whole.columns) == ["step", "block", "name", "value"]
        assert list(whole["step"]) == [10] * 4 + [20] * 4 and set(whole["block"]) == {"layers.0.branches.0.blocks.3"}
        shares = whole[whole["name"] == "least_used"]["value"]
        assert ((shares >= 0) & (shares <= 0.5)).all()
        biases = [load_model(name)[0].layers[0].branches[0].blocks[3].selection_bias for name in ("whole", "interrupted")]
        assert biases[0].any() and biases[0].equal(biases[1])

    def test_without_experts_there_is_no_blocks_csv(self, tiny_run):
        assert not (Run(tiny_run).folder / "blocks.csv").exists() and dead_experts(tiny_run) is None

    def test_dead_experts_are_reported_at_the_end(self, make_config, monkeypatch, capsys):
        layers = "Norm->MoE(num_experts=3, top_k=1, renormalise=False, bias_rate=0.0)->+"
        monkeypatch.setattr(MoE, "after_step", lambda moe: moe.selection_bias.copy_(torch.tensor([0.0, 0.0, -9.0])))
        main(Arguments(name="dying", model=replace(MODEL, layers=layers), train=make_config()))
        line = dead_experts("dying")
        assert "1 in layers.0.branches.0.blocks.1" in line
        assert line in capsys.readouterr().out.splitlines()
        assert line in Run("dying").path("README.md").read_text(encoding="utf-8")


class TestInAModel:
    def test_arctic_is_a_dense_layer_parallel_to_experts(self):
        config = replace(MODEL, layers=["Norm->Attn->+->Norm->MLP->+", "Norm->MoE(num_experts=4)->+"])
        torch.manual_seed(0)
        model = build_model(config, 50).eval()
        dense, sparse = model.layers[0].branches
        x = torch.randn(2, 7, MODEL.dim)
        norm, moe = sparse.blocks
        torch.testing.assert_close(model.layers[0](x), dense(x) + moe(norm(x)))
        assert model(torch.randint(50, (2, 7)))[0].shape == (2, 7, 50)

    def test_decodes_as_at_once_and_drops_nothing(self):
        torch.manual_seed(0)
        model = build_model(replace(TINY, layers=TINY.layers.replace("=4", "=4, capacity=0.5")), 50).eval()
        tokens, cache = torch.randint(50, (1, 12)), Cache()
        logits = [model(tokens[:, t : t + 1], cache=cache)[0] for t in range(12)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens)[0], atol=1e-5, rtol=1e-5)

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        torch.manual_seed(0)
        config = replace(TINY, num_layers=2, layers=TINY.layers.replace("=4", "=4, noise=0.5, capacity=1.0, z_loss=0.01"))
        model, tokens = build_model(config, 50).train(), torch.randint(50, (2, 30))
        check_gradient_checkpointing(model, tokens)

    def test_dynamo_traces_it_in_one_piece(self):
        """The operator of the experts needs no graph break, and no new trace when their shares change."""
        moe = make(noise="learned", capacity=1.0, bias_rate=0.01).train()
        traces = []

        def count(graph, inputs):
            traces.append(graph)
            return graph.forward

        compiled = torch.compile(moe, backend=count, fullgraph=True, dynamic=False)
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(2, 9, D)
            torch.manual_seed(seed)
            expected = moe(x)
            torch.manual_seed(seed)
            torch.testing.assert_close(compiled(x), expected)
        assert len(traces) == 1
        torch._dynamo.reset()

    def test_muon_updates_a_stack_as_its_single_matrices(self, make_config):
        torch.manual_seed(0)
        moe = MoE(dim=D, mlp_dim=WIDTH, num_experts=3, linear_bias=True)
        optimizers = build_optimizers(moe, make_config(optimizer="Muon", lr_max=0.1, weight_decay=0.5))
        stack = moe.experts.w_in.weight
        alone = [torch.nn.Parameter(weight.detach().clone()) for weight in stack]
        one_by_one = Muon(alone, lr=0.1, weight_decay=0.5)
        for _ in range(2):
            stack.grad = torch.randn_like(stack)
            for weight, gradient in zip(alone, stack.grad, strict=True):
                weight.grad = gradient.clone()
            for optimizer in (*optimizers, one_by_one):
                optimizer.step()
        torch.testing.assert_close(stack.detach(), torch.stack(alone).detach())
        undecayed = [weight for group in optimizers[-1].param_groups if not group["weight_decay"] for weight in group["params"]]
        assert any(weight is moe.experts.w_in.bias for weight in undecayed)

    def test_contract_with_biases_and_without_gates(self):
        config = ModelConfig(dim=24, num_heads=4, max_seq_len=80, linear_bias=True, gated=False, mlp_dim=27)
        check_block("MoE", config, swaps=(partial(fast.use, kernels=False),))


@pytest.mark.parametrize(
    "options, problem",
    [
        ("top_k=9", "top_k=9: a token chooses among 8 experts, so give 1 to 8"),
        ("num_experts=4, top_k=5", "top_k=5: a token chooses among 4 experts"),
        ("top_k=0", "top_k=0"),
        ("num_experts=0", "num_experts=0: give a whole number of at least 1"),
        ("top_k=1", "Set renormalise=False"),
        ("capacity=0.0", "capacity=0.0: give a positive number"),
        ("routed_scale=-1.0", "routed_scale=-1.0: give a positive number"),
        ("noise=-0.1", "noise=-0.1: give a number of at least 0"),
        ("noise='loud'", "MoE(noise='loud')"),
        ("bias_rate=-1.0", "bias_rate=-1.0: give a number of at least 0"),
        ("shared_gate=True", "shared_gate=True: without shared experts there is nothing to gate: set shared_experts=1"),
        ("shared_experts=-1", "shared_experts=-1: give a number of at least 0"),
        ("groups=3", "groups=3: it must divide num_experts=8 into groups of at least 2"),
        ("groups=8", "groups=8"),
        ("top_groups=2", "top_groups=2: give 1 to 1"),
        ("groups=4, top_k=3", "top_groups=1: give 1 to 4, groups with at least top_k=3 experts"),
        ("scores='tanh'", "MoE(scores='tanh')"),
        ("experts=4", "MoE has no option 'experts'. Did you mean 'num_experts'?"),
    ],
)
def test_bad_options_are_marked_in_the_layer_string(options, problem):
    layers = f"Norm->MoE({options})->+"
    one_line_error(lambda: build_model(replace(MODEL, layers=layers), 50), f"Norm->»MoE({options})«->+", problem)
