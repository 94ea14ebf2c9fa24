"""The statistics of the profile against naive scripts in fp64, and against what must hold by definition."""

from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from cache.bundle import BundleDtype, BundleLayout
from cache.policy import DECAY, DecayedFrequency, choose_swaps
from runtime import affinity, coactivation, replay
from runtime.calibrate import LayerTail, thresholds
from runtime.predictivity import predictivity, top_scores
from runtime.read_cost import read_cost
from runtime.sparsity import CETT_TARGETS, cett_at_increase, compare, likelihood


def layer(seed: int = 0, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """h [N, F] of a ReLU² layer with hot neurons and neighbouring tokens alike, down [F, D]."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(tokens, 48, generator=generator).cumsum(0) * 0.3 + torch.randn(tokens, 48, generator=generator)
    h = (drift + torch.linspace(1, -2, 48)).relu().pow(2)
    return h, torch.randn(48, 20, generator=generator)


def naive_cett(h: np.ndarray, down: np.ndarray, epsilon: float) -> float:
    """By the definition, in fp64, a token and a neuron at a time."""
    errors = []
    for row in h:
        whole, tail = np.zeros(down.shape[1]), np.zeros(down.shape[1])
        for factor, vector in zip(row, down, strict=True):
            whole += factor * vector
            if np.linalg.norm(factor * vector) < epsilon:
                tail += factor * vector
        errors.append(np.linalg.norm(tail) / np.linalg.norm(whole))
    return float(np.mean(errors))


def trace(seed: int, tokens: int = 80, size: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    share = np.linspace(0.6, 0.02, size) * rng.uniform(0.5, 1.5, size)
    rows = rng.random((tokens, size)) < share
    rows[1:] |= rows[:-1] & (rng.random((tokens - 1, size)) < 0.3)
    return [np.flatnonzero(r) for r in rows]


class TestThresholds:
    def test_meet_their_targets_by_the_naive_sum(self) -> None:
        h, down = layer()
        tail = LayerTail(h, down)
        found = thresholds(tail, tail.magnitude, CETT_TARGETS)
        rows, vectors = h.double().numpy(), down.double().numpy()
        sizes = np.unique(np.abs(rows) * np.linalg.norm(vectors, axis=1))
        for target, epsilon in zip(CETT_TARGETS, found, strict=True):
            assert naive_cett(rows, vectors, float(epsilon)) <= target * (1 + 1e-5)
            step = sizes[sizes > float(epsilon) * 1.06]  # a little higher, past the next neuron: the target is passed
            assert naive_cett(rows, vectors, float(step[2]) * 1.001) > 0.96 * target

    def test_cett_rises_with_epsilon(self) -> None:
        h, down = layer(1)
        tail = LayerTail(h, down)
        grid = torch.logspace(-3, 3, 40).tolist()
        naive = [naive_cett(h.double().numpy(), down.double().numpy(), e) for e in grid]
        fast = [tail.cett(tail.magnitude >= e) for e in grid]
        np.testing.assert_allclose(fast, naive, rtol=1e-4, atol=1e-6)
        assert naive[0] < 0.01 and naive[-1] == pytest.approx(1.0)
        assert (np.diff(thresholds(tail, tail.magnitude, CETT_TARGETS)) > 0).all()

    def test_a_silent_layer_drops_nothing(self) -> None:
        _, down = layer()
        silent = LayerTail(torch.zeros(8, 48), down)
        assert (thresholds(silent, silent.magnitude, CETT_TARGETS) == 0).all()


class TestLikelihood:
    def test_equals_fp64(self) -> None:
        generator = torch.Generator().manual_seed(2)
        dense, sparse = (torch.randn(50, 30, generator=generator) * 2 for _ in range(2))
        targets = torch.randint(0, 30, (50,), generator=generator)
        p, q = (torch.log_softmax(t.double(), dim=1).numpy() for t in (dense, sparse))
        found = likelihood(sparse, torch.log_softmax(dense, dim=1), targets)
        np.testing.assert_allclose(found.nll, -q[np.arange(50), targets], rtol=1e-5)
        np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-4)
        np.testing.assert_array_equal(found.same_top, p.argmax(axis=1) == q.argmax(axis=1))
        row = compare(-p[np.arange(50), targets], found)
        assert row["increase_percent"] == pytest.approx(
            100 * (np.exp(found.nll.mean() + p[np.arange(50), targets].mean()) - 1), rel=1e-6
        )

    def test_the_one_percent_point(self) -> None:
        cetts = (0.02, 0.05, 0.1)
        assert cett_at_increase(cetts, [100 * c**2 for c in cetts], 0.09) == pytest.approx(0.03)  # a power is exact
        assert cett_at_increase(cetts, (2.0, 5.0, 9.0)) == pytest.approx(0.01)  # from zero: a straight line
        assert cett_at_increase(cetts, (-0.2, 1.8, 9.0)) == pytest.approx(0.02 + 0.03 * 0.6)
        assert cett_at_increase(cetts, (0.1, 0.2, 0.3)) == 0.1


class TestAffinity:
    def test_reuse_and_unions_equal_sets(self) -> None:
        active = np.random.default_rng(3).random((3, 20, 30)) < 0.2
        active[1, 5] = False  # an empty set has no reuse
        sets = [[set(np.flatnonzero(row)) for row in window] for window in active]
        expected = [len(a & b) / len(b) for w in sets for a, b in pairwise(w) if b]
        assert affinity.reuse(active) == pytest.approx(float(np.mean(expected)), rel=1e-12)
        found = affinity.union_shares(active, 16)
        for width in range(1, 17):
            unions = [len(set().union(*w[i : i + width])) / 30 for w in sets for i in range(20 - width + 1)]
            assert found[width - 1] == pytest.approx(float(np.mean(unions)), rel=1e-12)

    def test_reuse_of_independent_tokens(self) -> None:
        rng = np.random.default_rng(4)
        share = rng.random(200)
        active = rng.random((1, 4000, 200)) < share
        assert affinity.reuse(active) == pytest.approx(affinity.independent_reuse(share), rel=0.01)

    def test_skew(self) -> None:
        assert affinity.skew(np.array([1.0, 4.0, 3.0, 2.0]), (0.25, 0.5, 1.0)) == pytest.approx([0.4, 0.7, 1.0])


class TestCoactivation:
    def test_counts_partners_and_gap_equal_the_naive_ones(self) -> None:
        active = np.random.default_rng(5).random((90, 24)) < np.linspace(0.5, 0.05, 24)
        active[:, 7] = active[:, 20]  # a pair
        counts = coactivation.joint_counts(active)
        naive = np.array([[float((active[:, i] & active[:, j]).sum()) for j in range(24)] for i in range(24)])
        np.testing.assert_array_equal(counts, naive)
        ids, share = coactivation.top_partners(counts, 3)
        assert ids[7, 0] == 20 and ids[20, 0] == 7 and share[7, 0] == 1.0
        assert (ids != np.arange(24)[:, None]).all()
        tops, averages = [], []
        for i in range(24):
            if naive[i, i] < 5:
                continue
            given = sorted((naive[i, j] / naive[i, i] for j in range(24) if j != i), reverse=True)
            tops.append(np.mean(given[:3]))
            averages.append(np.mean(given))
        gap = coactivation.coactivation_gap(counts, 90, num_partners=3, min_count=5)
        assert gap.top == pytest.approx(np.mean(tops), rel=1e-6)
        assert gap.gap == pytest.approx(np.mean(tops) - np.mean(averages), rel=1e-5)
        assert gap.hot == pytest.approx(np.sort(np.diag(naive))[-3:].mean() / 90)

    def test_the_order_brings_friends_together_and_keeps_the_hot_apart(self) -> None:
        rng = np.random.default_rng(6)
        group = rng.permutation(np.repeat(np.arange(8), 5))  # 8 groups of 5 neurons that are active together
        active = (rng.random((400, 8)) < 0.2)[:, group]
        active[:, 3] = active[:, 17] = True  # everybody's friends
        order = coactivation.coactivation_order(coactivation.joint_counts(active), 2)
        np.testing.assert_array_equal(np.sort(order), np.arange(40))
        assert set(order[:2]) == {3, 17}
        changes = int((np.diff(group[order[2:]]) != 0).sum())
        assert changes == 7  # each group is one run

    def test_orders_without_hot_or_cold_neurons(self) -> None:
        counts = coactivation.joint_counts(np.random.default_rng(7).random((50, 12)) < 0.3)
        for num_hot in (0, 12):
            assert sorted(coactivation.coactivation_order(counts, num_hot)) == list(range(12))

    def test_the_disk_order_has_the_hottest_first_at_each_edge_and_friends_together_between(self) -> None:
        rng = np.random.default_rng(8)
        group = rng.permutation(np.repeat(np.arange(8), 5))
        often = np.where(np.arange(8) < 4, 0.5, 0.1)  # four groups are hot
        active = (rng.random((600, 8)) < often)[:, group]
        edges = (0, 10, 20)
        order = coactivation.disk_order(active, edges)
        np.testing.assert_array_equal(np.sort(order), np.arange(40))
        frequency = active.mean(axis=0)
        for edge in edges:
            assert frequency[order[:edge]].min(initial=1) >= frequency[order[edge:]].max()
        assert int((np.diff(group[order[:10]]) != 0).sum()) == int((np.diff(group[order[10:20]]) != 0).sum()) == 1
        assert int((np.diff(group[order[20:]]) != 0).sum()) == 3  # each group is one run
        other = rng.random(40)
        ranked = coactivation.disk_order(active, edges, other)
        assert set(ranked[:10]) == set(np.argsort(-other)[:10])
        small = coactivation.disk_order(active, edges, block=7)
        assert [set(small[a:b]) for a, b in ((0, 10), (10, 20))] == [set(order[a:b]) for a, b in ((0, 10), (10, 20))]


def naive_ranked(steps: list[np.ndarray], capacity: int, key: dict[int, tuple[float, ...]], lru: bool) -> int:
    """A cache of sets: hits, then misses enter and the least recently used leave."""
    inside = set(sorted(key, key=lambda i: (key[i], -i), reverse=True)[:capacity])
    hits = 0
    for step, ids in enumerate(steps):
        hits += len(inside & set(ids.tolist()))
        for i in ids.tolist():
            key[i] = (float(step),)
        everything = inside | set(ids.tolist())
        inside = set(sorted(everything, key=lambda i: (key[i], -i), reverse=True)[:capacity])
    return hits


def naive_shipped(steps: list[np.ndarray], capacity: int, prior: np.ndarray) -> int:
    """As `cache.neuron_cache` does it: filled with the best, then swaps by `choose_swaps`."""
    policy = DecayedFrequency(prior[None])
    slots = np.argsort(-policy.scores(0), kind="stable")[:capacity]
    hits = 0
    for ids in steps:
        inside = np.isin(ids, slots)
        hits += int(inside.sum())
        policy.touch(0, ids)
        misses, scores = ids[~inside], policy.scores(0)
        admit, evict = choose_swaps(scores[misses], scores[slots], 0)
        slots[evict] = misses[admit]
    return hits


def best_possible(steps: list[np.ndarray], capacity: int) -> int:
    """Hits of the best policy, by trying all."""

    @cache
    def best(step: int, inside: frozenset[int]) -> int:
        if step == len(steps):
            return 0
        ids = frozenset(steps[step].tolist())
        everything = sorted(inside | ids)
        stays = combinations(everything, min(capacity, len(everything)))
        return len(inside & ids) + max(best(step + 1, frozenset(s)) for s in stays)

    ids = sorted({int(i) for s in steps for i in s})
    return max(best(0, frozenset(s)) for s in combinations(ids, min(capacity, len(ids))))


class TestReplay:
    CAPACITIES = (0, 1, 3, 8, 20, 39, 40)

    @pytest.mark.parametrize("seed", range(4))
    def test_recency_equals_a_naive_cache(self, seed: int) -> None:
        steps, prior = trace(seed), np.linspace(1, 0, 40)
        found = replay.recency(steps, self.CAPACITIES, prior)
        for capacity, hits in zip(self.CAPACITIES, found, strict=True):
            key: dict[int, tuple[float, ...]] = {i: (-1.0 - i,) for i in range(40)}
            assert hits == naive_ranked(steps, capacity, key, True)

    @pytest.mark.parametrize("seed", range(4))
    def test_ours_equals_the_shipped_policy(self, seed: int) -> None:
        steps, prior = trace(seed), np.random.default_rng(seed).random(40)  # without equals
        found = replay.frequency(steps, self.CAPACITIES, prior, DECAY)
        assert found.tolist() == [naive_shipped(steps, c, prior) for c in self.CAPACITIES]

    @pytest.mark.parametrize("seed", range(6))
    def test_belady_equals_the_best_of_all(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        steps = [np.sort(rng.choice(6, rng.integers(0, 4), replace=False)) for _ in range(7)]
        for capacity in range(4):
            assert replay.belady(steps, 6, capacity) == best_possible(steps, capacity)

    @pytest.mark.parametrize("seed", range(8))
    def test_no_policy_beats_belady(self, seed: int) -> None:
        steps = trace(seed)
        prior = np.bincount(np.concatenate(steps), minlength=40) / len(steps)  # even static with hindsight
        found = replay.hit_rates(steps, 40, self.CAPACITIES, prior)
        assert set(found) == set(replay.POLICIES)
        for name, rates in found.items():
            assert all(b >= r for b, r in zip(found["belady"], rates, strict=True)), name
            assert rates[0] == 0 and rates[-1] == 1 and rates == sorted(rates)

    def test_static_is_the_share_of_its_neurons(self) -> None:
        steps, prior = trace(9), np.linspace(1, 0, 40)
        expected = sum(int((s < 8).sum()) for s in steps)
        assert replay.static(steps, (8,), prior).tolist() == [expected]

    def test_recency_gets_nothing_in_a_pool_below_one_token_and_frequency_does(self) -> None:
        rng = np.random.default_rng(0)
        share = np.array([0.95] * 4 + [0.3] * 20)  # 10 neurons of a layer are active, 4 of them nearly always
        layers = [[np.flatnonzero(rng.random(24) < share) for _ in range(60)] for _ in range(5)]
        found = replay.pool_hit_rates(layers, 24, (20, 40), np.tile(share[::-1], (5, 1)))  # a wrong prior
        assert found["lru"][0] < 0.05 and found["static"][0] < 0.2
        assert found["lfu"][0] > 0.3 and found["belady"][0] > found["lfu"][0]

    @pytest.mark.parametrize("seed", range(3))
    def test_no_policy_beats_belady_in_a_pool(self, seed: int) -> None:
        layers = [trace(10 * seed + i) for i in range(4)]
        priors = np.random.default_rng(seed).random((4, 40))
        capacities = (5, 20, 60, 120)
        found = replay.pool_hit_rates(layers, 40, capacities, priors)
        for rates in found.values():
            assert all(b >= r for b, r in zip(found["belady"], rates, strict=True))
        flat = replay.pooled(layers, 40)
        key: dict[int, tuple[float, ...]] = {
            int(i): (-1.0 - place,) for place, i in enumerate(np.argsort(-priors.reshape(-1), kind="stable"))
        }
        total = sum(s.size for s in flat)
        assert found["lru"][1] * total == pytest.approx(naive_ranked(flat, 20, key, True))


class TestReadCost:
    LAYOUT = BundleLayout.make(48, True, BundleDtype.BF16)  # 296 bytes, records of 512 would be aligned

    def test_by_hand(self) -> None:
        assert self.LAYOUT.stride == 296
        sets, order = [np.array([0, 1, 5, 30])], np.arange(40)
        found = read_cost(sets, order, self.LAYOUT, (0, 3, 24), alignment=8)
        assert found.tolist() == [[3, 4 * 296], [2, (6 + 1) * 296], [1, 31 * 296]]
        order = np.concatenate([[5, 30, 0, 1], np.setdiff1d(np.arange(40), [5, 30, 0, 1])])
        assert read_cost(sets, order, self.LAYOUT, (0,), alignment=8).tolist() == [[1, 4 * 296]]
        assert read_cost([np.array([1])], np.arange(40), self.LAYOUT, (0,), alignment=512).tolist() == [[1, 1024]]

    def test_sets_are_averaged_and_empty_ones_cost_nothing(self) -> None:
        sets = [np.array([3]), np.empty(0, np.int64)]
        assert read_cost(sets, np.arange(40), self.LAYOUT, (0,), alignment=8).tolist() == [[0.5, 148]]


class TestPredictivity:
    def test_the_exact_scores_recall_everything(self) -> None:
        h, down = layer()
        tail = LayerTail(h, down)
        epsilon = float(thresholds(tail, tail.magnitude, (0.1,))[0])
        active = tail.magnitude >= epsilon
        hits = predictivity(tail, active, tail.magnitude, (1.0, 1.5))
        assert hits[0].recall == hits[0].precision == 1.0
        assert hits[0].cett == pytest.approx(naive_cett(h.double().numpy(), down.double().numpy(), epsilon), rel=1e-4)
        assert hits[1].recall == 1.0 and hits[1].precision < 0.8 and hits[1].energy > hits[0].energy

    def test_figures_equal_sets(self) -> None:
        h, down = layer(2)
        tail = LayerTail(h, down)
        active = tail.magnitude >= float(thresholds(tail, tail.magnitude, (0.2,))[0])
        scores = tail.magnitude * torch.randn(h.shape, generator=torch.Generator().manual_seed(8)).exp()
        (hit,) = predictivity(tail, active, scores, (1.2,))
        both = taken = truly = 0
        kept = energy = 0.0
        for row, true, size in zip(scores.numpy(), active.numpy(), tail.magnitude.double().numpy(), strict=True):
            want = set(np.flatnonzero(true).tolist())
            got = set(np.argsort(-row, kind="stable")[: int(np.ceil(1.2 * len(want) - 1e-9))].tolist())
            both, taken, truly = both + len(want & got), taken + len(got), truly + len(want)
            kept, energy = kept + sum(size[i] ** 2 for i in got), energy + float((size**2).sum())
        assert (hit.recall, hit.precision) == pytest.approx((both / truly, both / taken))
        assert hit.energy == pytest.approx(kept / energy, rel=1e-5)

    def test_rows_have_budgets_of_their_own(self) -> None:
        scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
        taken = top_scores(scores, torch.tensor([1, 0, 3]), 1.5)
        assert taken.tolist() == [[True, False, True, False], [False] * 4, [True] * 4]
