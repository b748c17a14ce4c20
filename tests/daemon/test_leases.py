"""A model that a request holds stays open; one that is neither held nor served is closed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.wait import until
from whisperd.config import ModelTable
from whisperd.daemon.leases import Leases
from whisperd.daemon.models import ModelInstance, ServedModel, ServedModels
from whisperd.errors import ModelLoading
from whisperd.transcription.model import LoadedModel

NAMES = ("a", "b", "c")
EXAMPLES = 60  # each closes a few threads


class ClosableBatcher:
    """Counts how often it was closed."""

    failure = None

    def __init__(self) -> None:
        self.n_closed = 0

    def close(self) -> None:
        self.n_closed += 1


class LeasesMachine(RuleBasedStateMachine):
    """Reloads, requests and evictions in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases()
        self.batchers: dict[int, ClosableBatcher] = {}
        self.instances: list[ModelInstance] = []
        self.requests: list[tuple[ModelInstance, ExitStack]] = []

    def opened(self, name: str) -> ModelInstance:
        batcher = ClosableBatcher()
        model = LoadedModel(name=name, vocabulary=None, batcher=batcher, detector=None)  # type: ignore[arg-type]
        instance = ModelInstance(model=model, snapshot=Path(name))
        self.batchers[id(instance)] = batcher
        self.instances.append(instance)
        return instance

    def serving(self, name: str) -> ModelInstance | None:
        entry = self.leases.served.find(name)
        return entry.instance if entry is not None else None

    @rule(names=st.sets(st.sampled_from(NAMES)), kept=st.sets(st.sampled_from(NAMES)))
    def reload(self, names: set[str], kept: set[str]) -> None:
        instances = {name: (self.serving(name) if name in kept else None) or self.opened(name) for name in names}
        tables = [ModelTable(repo=f"path:/{name}", name=name) for name in sorted(names)]
        declared = ServedModels(tuple(ServedModel(table=table) for table in tables))
        self.leases.swap(declared.with_instances(instances))

    @rule(name=st.sampled_from(NAMES))
    def swap_out_and_in_again(self, name: str) -> None:
        before, instance = self.leases.served, self.serving(name)
        if instance is None:
            return
        self.leases.swap(before.changed(name, instance=None))
        self.leases.swap(before if self.leases.readmit(instance) else before.changed(name, instance=self.opened(name)))

    @rule(name=st.sampled_from(NAMES))
    def request(self, name: str) -> None:
        held = ExitStack()
        try:
            model = held.enter_context(self.leases.lease(name))
        except ModelLoading:
            assert self.serving(name) is None
        else:
            (instance,) = [one for one in self.instances if one.model is model]
            self.requests.append((instance, held))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.requests:
            found = data.draw(st.sampled_from(self.requests))
            self.requests.remove(found)
            found[1].close()

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        instance = self.serving(name)
        is_held = any(one is instance for one, _ in self.requests)
        assert self.leases.unload(name) == (instance is not None and not is_held)

    @invariant()
    def open_while_used(self) -> None:
        served = [one.instance for one in self.leases.served]
        for instance in self.instances:
            is_used = instance in served or any(one is instance for one, _ in self.requests)
            batcher = self.batchers[id(instance)]
            if is_used:
                assert batcher.n_closed == 0
            else:
                assert self.leases.wait_closed([instance], 10)
                assert batcher.n_closed == 1

    def teardown(self) -> None:
        for _, held in self.requests:
            held.close()
        self.leases.close()
        assert all(batcher.n_closed == 1 for batcher in self.batchers.values())


LeasesMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=20)
TestLeases = LeasesMachine.TestCase


def test_idle_models_are_those_that_nobody_holds() -> None:
    """Idle models are those without a lease, ordered by their last use, the oldest first."""
    now_s = 0.0
    leases, machine = Leases(lambda: now_s), LeasesMachine()
    tables = [ModelTable(repo=f"path:/{name}", name=name) for name in NAMES]
    declared = ServedModels(tuple(ServedModel(table=table) for table in tables))
    leases.swap(declared.with_instances({name: machine.opened(name) for name in NAMES}))
    now_s = 5.0
    with leases.lease("a"):
        pass
    now_s = 8.0
    with leases.lease("b"):
        assert leases.idle() == [("c", 8.0), ("a", 3.0)]
    with pytest.raises(ModelLoading), leases.lease("d"):
        pass
    leases.close()
    until(lambda: all(instance.state == "closed" for instance in machine.instances))
