"""Promises of diff.py: what is alike, what differs and what only one has; as text, as a cell and as a page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from config import PRE_NORM, SANDWICH_NORM, ModelConfig
from evaluation import __main__ as evaluation
from evaluation.alignment import align, layers_of
from evaluation.diff import diff
from evaluation.diff_view import as_page, weight_shapes
from metrics.cost import cost_of

BASE = ModelConfig(dim=24, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=32, max_seq_len=16)


def marks(left: ModelConfig, right: ModelConfig) -> list[str]:
    """'≠ layers.0–3 | layers.0–3: =Norm ≠Attn ...' for each group."""
    told = []
    for group in diff(left, right).groups:
        rows = [f"{row.mark}{(row.left or row.right).step}" for row in group.rows]
        told.append(f"{group.mark} {group.title('left')} | {group.title('right')}: {' '.join(rows)}")
    return told


class Page(HTMLParser):
    """The text of each row of a page, and whether all that was opened is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.rows, self.open, self.links = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag == "tr":
            self.rows.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th") and self.rows:
            self.rows[-1] += "|"

    def handle_data(self, text):
        if "tr" in self.open:
            self.rows[-1] += text.strip()


class TestWhatDiffers:
    def test_the_same_is_alike_and_folded(self):
        assert marks(BASE, BASE) == [
            "= embedding | embedding: =embedding",
            "= layers.0–3 × 4 | layers.0–3 × 4: =Norm =Attn =+ =Norm =MLP =+",
            "= norm | norm: =norm",
            "= head | head: =head",
        ]
        compared = diff(BASE, BASE)
        assert compared.config_rows == [] and all(left == right for _, left, right in compared.totals)

    def test_norms_that_only_one_has_stand_where_they_are(self):
        assert marks(BASE, replace(BASE, layers=SANDWICH_NORM))[1] == (
            "≠ layers.0–3 × 4 | layers.0–3 × 4: =Norm =Attn →Norm =+ =Norm =MLP →Norm =+"
        )
        assert marks(replace(BASE, layers=SANDWICH_NORM), BASE)[1].count("←Norm") == 2

    def test_layers_that_only_one_has(self):
        told = marks(BASE, replace(BASE, num_layers=1))
        assert told[1] == "= layers.0 | layers.0: =Norm =Attn =+ =Norm =MLP =+"
        assert told[2] == "← layers.1–3 × 3 | : ←Norm ←Attn ←+ ←Norm ←MLP ←+"

    def test_layers_that_take_turns_are_folded_each(self):
        turns = replace(BASE, layers=("Norm->Attn(window=4)->+->Norm->MLP->+", PRE_NORM))
        assert marks(BASE, turns)[1:3] == [
            "≠ layers.0, 2 × 2 | layers.0, 2 × 2: =Norm ≠Attn =+ =Norm =MLP =+",
            "= layers.1, 3 × 2 | layers.1, 3 × 2: =Norm =Attn =+ =Norm =MLP =+",
        ]

    def test_another_kind_of_the_same_stands_in_its_place(self):
        attention = replace(BASE, layers="Norm->ValueAttn->+->Norm->MLP->+")
        assert marks(BASE, attention)[1] == "≠ layers.0–3 × 4 | layers.0–3 × 4: =Norm ≠Attn =+ =Norm =MLP =+"
        (row,) = [row for row in diff(BASE, attention).groups[1].rows if row.mark != "="]
        assert (row.left.kind, row.right.kind) == ("Attention", "ValueAttention")
        assert marks(BASE, replace(BASE, layers="Norm->ShortConv->+->Norm->MLP->+"))[1].endswith(
            "=Norm ←Attn →ShortConv =+ =Norm =MLP =+"
        )

    def test_branches_and_where_skips_begin(self):
        parallel = replace(BASE, layers=["Norm->Attn->+", "Norm->MLP->+"])
        assert marks(BASE, parallel)[1].endswith("→branch 1 =Norm =Attn =+ →branch 2 =Norm =MLP =+")
        assert marks(BASE, replace(BASE, layers="Norm->Attn->|->Norm->MLP->+"))[1].endswith("=Norm =Attn ←+ →| =Norm =MLP =+")

    def test_a_setting_without_a_weight_is_a_difference(self):
        compared = diff(BASE, replace(BASE, activation="GELU", attention_soft_cap=5.0))
        assert compared.config_rows == [("activation", "SiLU", "GELU"), ("attention_soft_cap", "None", "5.0")]
        assert [row.mark for row in compared.groups[1].rows] == ["=", "≠", "=", "=", "≠", "="]
        assert "activation=SiLU" in str(compared) and "attention_soft_cap=5.0" in str(compared)
        assert "norm_eps=" not in str(compared)

    def test_embeddings_and_totals(self):
        compared = diff(replace(BASE, positions="learned"), replace(BASE, max_seq_len=8))
        assert [(group.mark, group.title("left")) for group in compared.groups][:2] == [
            ("=", "embedding"), ("←", "position_embedding"),
        ]  # fmt: skip
        totals = {label: numbers for label, *numbers in compared.totals}
        assert totals["parameters"][0] - totals["parameters"][1] == 16 * 24
        assert totals["cache bytes after the context"] == [16 * 4 * 2 * 2 * 6 * 4, 8 * 4 * 2 * 2 * 6 * 4]
        assert totals["FLOPs per token"][0] - totals["FLOPs per token"][1] == 4 * 4 * 4 * 6 * (8.5 - 4.5)
        assert "the mean over 16 and 8 tokens" in compared.legend

    def test_presets_and_runs_by_name(self, tiny_run):
        compared = diff("1m", tiny_run)
        assert ("dim", "128", "16") in compared.config_rows and ("vocabulary", "1,027", "131") in compared.config_rows
        assert compared.totals[0] == ("parameters", 993_024, cost_of(tiny_run).parameters)
        assert compared.left.title == "1m" and diff(BASE, BASE).left.title == "a config (left)"
        with pytest.raises(ValueError, match="'3m' is neither a preset nor a run"):
            diff("1m", "3m")


def test_alignment_keeps_all_in_order():
    left, right = list("abXcdY"), list("abcZdyW")
    pairs = list(align(left, right, key=str, related=lambda one, other: one.lower() == other.lower()))
    assert [one for one, _ in pairs if one] == left and [other for _, other in pairs if other] == right
    assert pairs == [("a", "a"), ("b", "b"), ("X", None), ("c", "c"), (None, "Z"), ("d", "d"), ("Y", "y"), (None, "W")]


def test_weights_of_one_shape_are_told_in_one_breath():
    (mlp,) = [part for part in layers_of(cost_of(BASE))[1][1] if part.step == "MLP"]
    assert weight_shapes(mlp) == ["w_gate 32×24", "w_in 32×24", "w_out 24×32"]
    experts = replace(mlp, shapes={f"experts.{number}.weight": (3, 4) for number in range(4)} | {"scale": ()})
    assert weight_shapes(experts) == ["experts.0–3 3×4", "scale scalar"]


class TestPage:
    RIGHT = replace(BASE, layers="Norm->Attn(window=4)->Norm->+->Norm->MLP->+", num_layers=5, activation="GELU")

    def test_rows_say_in_marks_what_colours_say(self):
        page = Page(as_page(diff(BASE, self.RIGHT)))
        assert page.open == [] and page.links == []
        rows = page.rows
        assert "activation|SiLU|GELU|" in rows and "num_layers|4|5|" in rows
        (attention,) = [row for row in rows if row.startswith("Attn") and "Attn(window=4)" in row]
        assert "|≠|" in attention and "w_q 24×24" in attention
        assert any(row.startswith("||||→|Norm") for row in rows)
        assert any(row.startswith("parameters|") for row in rows)
        (total,) = [row for row in rows if row.startswith("FLOPs per token|")]
        left, right = cost_of(BASE).flops, cost_of(self.RIGHT).flops
        assert total == f"FLOPs per token|{left:,.0f}|{right:,.0f}|× {right / left:.2f}|"

    def test_a_notebook_gets_the_same_tables(self):
        compared = diff(BASE, self.RIGHT)
        cell = compared._repr_html_()
        assert cell in as_page(compared) and "<html" not in cell and "color-scheme: light dark" in as_page(compared)
        assert repr(compared) == str(compared)  # where no HTML is shown

    def test_parts_of_layers_fold(self):
        cell = diff(BASE, self.RIGHT)._repr_html_()
        layers = re.findall(r"<details( open)?><summary>([\w.–]*)", cell)
        assert layers == [(" open", "layers.0–3"), ("", "")]  # open where both have the layer

    def test_names_cannot_break_it(self):
        compared = diff(BASE, BASE)
        compared = replace(compared, left=replace(compared.left, title="<b>&"))
        assert "<b>" not in as_page(compared) and "&lt;b&gt;&amp;" in as_page(compared)

    def test_in_the_terminal(self, capsys, tmp_path):
        evaluation.run(["diff", "1m", "llama3_like"])
        shown = capsys.readouterr().out
        assert "1m  ≠  llama3_like" in shown and "tied_embeddings" in shown and "× " in shown
        evaluation.run(["diff", "1m", "2m", "--html", str(tmp_path / "page.html")])
        assert "the differences are in" in capsys.readouterr().out
        assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).open == []
