"""Policy, reference and their exact KL in one pass, chunked and fused, against float64."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import EVERYTHING, IMPLEMENTATIONS, TILED, Case, Inputs, cases, check_joint, drawn, place, small_tiles
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_grads_close
from torch import Tensor

from fastpo import joint_linear_logps, joint_linear_sequence_stats, linear_logps, linear_sequence_stats
from fastpo.kernels import configs


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with small_tiles():
        yield


@pytest.mark.parametrize("impl", TILED)
class TestAgainstFloat64:
    @drawn(30)
    @given(case=cases(frozen=st.just(True), uses=st.sampled_from(["logps", "kl", "all"])), kl=st.booleans())
    def test_frozen(self, impl: str, case: Case, kl: bool) -> None:
        case.uses = case.uses if kl else "logps"
        check_joint(case, impl, kl=kl, mode="frozen")

    @drawn(30)
    @given(case=cases(uses=st.sampled_from(["logps", "entropy", "kl", "all"])), kl=st.booleans())
    def test_lean(self, impl: str, case: Case, kl: bool) -> None:
        case.uses = case.uses if kl or case.uses == "entropy" else "logps"
        check_joint(case, impl, kl=kl, mode="lean")

    @drawn(30)
    @given(case=cases(contiguous=st.just(True)), kl=st.booleans(), rows=st.sampled_from([0, 9, 1000]))
    def test_stash(self, impl: str, case: Case, kl: bool, rows: int) -> None:
        check_joint(case, impl, kl=kl, mode="stash", memory_budget=rows * case.v * 5)

    @pytest.mark.parametrize("uses", ["kl", "all"])
    @pytest.mark.parametrize("rows", [9, 1000])
    def test_gradient_of_the_kl_of_stashed_rows(self, impl: str, uses: str, rows: int) -> None:
        case = Case(seed=21, n=20, d=8, v=150, uses=uses)
        check_joint(case, impl, kl=True, mode="stash", memory_budget=rows * case.v * 5)


@pytest.mark.parametrize("impl", TILED)
def test_more_column_tiles_than_the_reduction_takes_at_once(impl: str) -> None:
    case = Case(seed=26, n=20, d=4, v=32 * configs.REDUCE["BLOCK_T"] * 2 + 40, size=4.0, ignored=0.0, uses="all")
    check_joint(case, impl, kl=True)


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", ["frozen", "lean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(impl: str, mode: str, dtype: torch.dtype) -> None:
    """The KL too is that of the rounded inputs, to fp32."""
    case = Case(seed=22, n=30, d=32, v=150, frozen=mode == "frozen", dtype=dtype, uses="all", bias=mode == "lean")
    check_joint(case, impl, kl=True, mode=mode, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3)


def test_kl_of_the_reference_implementation_against_numpy() -> None:
    """The oracle itself, against the formula written out, and its gradient against finite differences."""
    case = Case(seed=23, n=5, d=4, v=7, bias=True, ignored=0.0, dtype=torch.float64)
    hidden, weight, bias, labels = case.tensors()
    options: dict[str, Any] = {"logit_scale": 1.3, "softcap": 2.0, "temperature": 0.7, "impl": "reference", "kl": True}

    def probs(rows: Tensor) -> np.ndarray:
        logits = 2.0 * np.tanh(1.3 * (rows.numpy() @ weight.numpy().T + bias.numpy()) / 2.0) / 0.7
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    p, q = probs(hidden), probs(case.ref_hidden())
    joint = joint_linear_logps(hidden, case.ref_hidden(), weight, labels, bias, **options)
    np.testing.assert_allclose(joint.kl, (p * np.log(p / q)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(joint.reference.logps, np.log(q[np.arange(5), labels]), rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda h: joint_linear_logps(h, case.ref_hidden(), weight, labels, bias, **options).kl, hidden.requires_grad_()
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
class TestEveryImplementation:
    def inputs(self, impl: str, **fields: Any) -> Inputs:
        return Inputs(Case(**{"seed": 24, "n": 20, "d": 8, "v": 150, **fields}), impl, torch.float32)

    @pytest.mark.parametrize("kl", [False, True])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_is_two_separate_calls(self, impl: str, kl: bool, frozen: bool) -> None:
        x = self.inputs(impl, bias=True, frozen=frozen)
        joint = joint_linear_logps(x.hidden, x.ref_hidden, x.weight, x.labels, x.bias, kl=kl, impl=impl)
        policy = linear_logps(x.hidden, x.weight, x.labels, x.bias, impl=impl)
        with torch.no_grad():
            reference = linear_logps(x.ref_hidden, x.weight, x.labels, x.bias, impl=impl)
        assert (joint.kl is not None) == kl
        for together, apart in zip((*joint.policy, *joint.reference), (*policy, *reference), strict=True):
            torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("softcap", [None, 4.0])
    def test_kl_is_exactly_zero_where_policy_is_reference(self, impl: str, softcap: float | None) -> None:
        x = self.inputs(impl, bias=True, ignored=0.0)
        ref_hidden = x.hidden.detach().clone()
        ref_hidden[3] += 1
        joint = joint_linear_logps(
            x.hidden, ref_hidden, x.weight, x.labels, x.bias, kl=True, softcap=softcap, impl=impl
        )
        same = torch.arange(20, device=x.hidden.device) != 3
        assert (joint.kl[same] == 0).all() and joint.kl[3] > 0.01
        (grad,) = torch.autograd.grad(joint.kl.sum(), x.hidden)
        assert grad[same].abs().max() < 1e-6 and grad[3].abs().max() > 1e-3

    def test_the_reference_is_a_constant(self, impl: str) -> None:
        x = self.inputs(impl)
        joint = joint_linear_sequence_stats(
            x.hidden, x.ref_hidden.requires_grad_(), x.weight, x.labels, cu_seqlens=x.ends, impl=impl, kl=True
        )
        assert not joint.reference.logps.requires_grad and not joint.reference.entropy.requires_grad

    @pytest.mark.parametrize("mode", ["auto", "no_grad"])
    def test_the_references_hidden_states_get_no_gradient(self, impl: str, mode: str) -> None:
        x = self.inputs(impl)
        ref_hidden = x.ref_hidden.requires_grad_()
        joint = joint_linear_logps(x.hidden, ref_hidden, x.weight, x.labels, impl=impl, kl=True, mode=mode)
        if mode == "no_grad":
            assert not any(s.requires_grad for s in (*joint.policy, *joint.reference, joint.kl))
            return
        loss = (joint.policy.logps - joint.reference.logps + joint.kl).sum()
        *got, of_reference = torch.autograd.grad(loss, (*x.leaves, ref_hidden), allow_unused=True)
        assert of_reference is None
        constants = joint_linear_logps(x.hidden, ref_hidden.detach(), x.weight, x.labels, impl=impl, kl=True)
        expected = torch.autograd.grad((constants.policy.logps + constants.kl).sum(), x.leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("kl", [False, True])
    def test_padded_equals_packed_and_empty_sequences_are_zero(self, impl: str, kl: bool) -> None:
        lengths, width = [5, 0, 9, 1], 9
        hidden, ref_hidden, weight = place(impl, *torch.randn(2, 4, width, 12), torch.randn(50, 12))
        labels = torch.randint(0, 50, (4, width), device=hidden.device)
        mask = torch.arange(width, device=hidden.device)[None] < torch.tensor(lengths, device=hidden.device)[:, None]
        labels[~mask] = -100
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        padded = joint_linear_sequence_stats(hidden, ref_hidden, weight, labels, kl=kl, impl=impl)
        packed = joint_linear_sequence_stats(
            hidden[mask], ref_hidden[mask], weight, labels[mask], cu_seqlens=ends, kl=kl, impl=impl
        )
        for a, b in zip((*padded.policy, *padded.reference), (*packed.policy, *packed.reference), strict=True):
            torch.testing.assert_close(a, b)
        apart = linear_sequence_stats(ref_hidden, weight, labels, impl=impl)
        torch.testing.assert_close(padded.reference.logps, apart.logps)
        assert padded.reference.lengths.tolist() == lengths
        assert padded.policy.logps[1] == padded.reference.logps[1] == padded.reference.entropy[1] == 0
        if kl:
            tokens = joint_linear_logps(hidden, ref_hidden, weight, labels, kl=True, impl=impl)
            torch.testing.assert_close(padded.kl, packed.kl)
            torch.testing.assert_close(padded.kl, tokens.kl.sum(1))
            assert padded.kl[1] == 0 and (tokens.kl[~mask] == 0).all() and tokens.kl.shape == labels.shape

    def test_ignored_rows_are_never_read(self, impl: str) -> None:
        x = self.inputs(impl, ignored=0.5)
        ignored = x.labels == -100
        assert ignored.any()
        with torch.no_grad():
            x.hidden[ignored], x.ref_hidden[ignored] = torch.nan, torch.nan
        joint = joint_linear_logps(x.hidden, x.ref_hidden, x.weight, x.labels, kl=True, impl=impl)
        for value in (*joint.policy, *joint.reference, joint.kl):
            assert (value[ignored] == 0).all() and value.isfinite().all()
        grads = torch.autograd.grad((joint.policy.logps + joint.policy.entropy + joint.kl).sum(), x.leaves)
        assert all(g.isfinite().all() for g in grads) and (grads[0][ignored] == 0).all()

    def test_nothing_labelled(self, impl: str) -> None:
        x = self.inputs(impl, ignored=1.0)
        joint = joint_linear_sequence_stats(
            x.hidden, x.ref_hidden, x.weight, x.labels, cu_seqlens=x.ends, kl=True, impl=impl
        )
        assert joint.kl.tolist() == joint.policy.logps.tolist() == joint.reference.logps.tolist() == [0, 0, 0]
        grads = torch.autograd.grad(joint.kl.sum() + joint.policy.logps.sum(), x.leaves)
        assert all((g == 0).all() for g in grads)

    def test_minus_infinity_in_the_bias(self, impl: str) -> None:
        """Tokens forbidden to both add 0 to the KL, and nothing to the gradients."""
        x = self.inputs(impl, bias=True, ignored=0.0, frozen=True)
        x.bias[:110] = -torch.inf
        labels = x.labels % 40 + 110
        joint = joint_linear_logps(x.hidden, x.ref_hidden, x.weight, labels, x.bias, kl=True, impl=impl)
        allowed = joint_linear_logps(
            x.hidden, x.ref_hidden, x.weight[110:], labels - 110, x.bias[110:], kl=True, impl="reference"
        )
        torch.testing.assert_close(joint.kl, allowed.kl, atol=1e-6, rtol=1e-5)
        got, expected = (torch.autograd.grad((s.kl + s.policy.logps).sum(), x.hidden)[0] for s in (joint, allowed))
        assert_grads_close("gradient", got, expected)

    @pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, in the interpreter
    def test_a_nan_of_either_model_is_not_lost(self, impl: str) -> None:
        x = self.inputs(impl, ignored=0.0)
        with torch.no_grad():
            x.hidden[1], x.ref_hidden[2] = torch.nan, torch.nan
            joint = joint_linear_logps(x.hidden, x.ref_hidden, x.weight, x.labels, kl=True, impl=impl)
        assert joint.policy.logps.isnan().nonzero().tolist() == [[1]]
        assert joint.reference.logps.isnan().nonzero().tolist() == [[2]]
        assert joint.kl.isnan().nonzero().tolist() == [[1], [2]]

    def test_bit_identical_from_run_to_run(self, impl: str) -> None:
        def run() -> list[Tensor]:
            x = self.inputs(impl, bias=True, uses="all")
            joint = joint_linear_logps(x.hidden, x.ref_hidden, x.weight, x.labels, x.bias, kl=True, impl=impl)
            grads = torch.autograd.grad((joint.kl + joint.policy.logps).sum(), x.leaves)
            return [*joint.policy, *joint.reference, joint.kl, *grads]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ref_hidden": torch.randn(2, 4)}, r"ref_hidden must have shape \(3, 4\), got \(2, 4\)"),
            ({"ref_hidden": torch.randn(3, 5)}, r"ref_hidden must have shape \(3, 4\), got \(3, 5\)"),
            (
                {"ref_hidden": torch.randn(3, 4).double()},
                "ref_hidden must have hidden's dtype torch.float32, got",
            ),
            ({"ref_hidden": [0.0]}, "ref_hidden must be a tensor, got list"),
            ({"mode": "slow"}, "mode must be one of .*, got 'slow'"),
            ({"temperature": math.inf}, "temperature must be > 0 and finite, got inf"),
        ],
    )
    def test_bad_input(self, impl: str, change: dict[str, Any], message: str) -> None:
        arguments = {"hidden": torch.randn(3, 4), "ref_hidden": torch.randn(3, 4), "weight": torch.randn(7, 4)}
        arguments = {**arguments, "labels": torch.tensor([0, 6, -100]), **change}
        with pytest.raises((ValueError, TypeError), match=message):
            joint_linear_logps(**dict(zip(arguments, place(impl, *arguments.values()), strict=True)), impl=impl)

    @pytest.mark.parametrize("function", [joint_linear_logps, joint_linear_sequence_stats])
    def test_there_is_no_skipping_here(self, impl: str, function: Any) -> None:
        x = self.inputs(impl, frozen=True)
        for options in ({"skip_mass": 0.01}, {"vocab_order": torch.arange(150)}):
            with pytest.raises((TypeError, ValueError), match=r"skip_mass|vocab_order"):
                function(x.hidden[None], x.ref_hidden[None], x.weight, x.labels[None], kl=True, impl=impl, **options)


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", ["frozen", "lean", "stash"])
def test_a_second_backward_is_the_same_and_a_second_derivative_an_error(impl: str, mode: str) -> None:
    case = Case(seed=25, n=20, d=8, v=150, frozen=mode == "frozen")
    x = Inputs(case, impl, torch.float32)
    budget = EVERYTHING if mode == "stash" else None
    joint = joint_linear_logps(
        x.hidden, x.ref_hidden, x.weight, x.labels, kl=True, impl=impl, mode=mode, memory_budget=budget
    )
    loss = (joint.policy.logps + joint.kl).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, x.leaves, create_graph=True, retain_graph=True)
    first = [g.clone() for g in torch.autograd.grad(loss, x.leaves, retain_graph=True)]
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, x.leaves), strict=True))
