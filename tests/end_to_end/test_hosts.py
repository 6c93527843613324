"""Two hosts train as one process, and when one is cut off, the other finishes alone."""

from __future__ import annotations

import pytest

from tests.end_to_end.tiny import arguments, run_here
from tests.torture import hosts


@pytest.fixture(scope="module")
def _namespaces():
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("_namespaces")
def test_a_host_that_is_cut_off_ends_and_the_other_goes_on_to_the_same_losses(photos, tmp_path):
    """Both hosts to some step, one from the last checkpoint to the end: the losses of all steps are one process's."""
    changes = (*hosts.CHANGES, "epochs=10")
    alone = run_here(photos, tmp_path / "alone", *changes)
    run, config = tmp_path / "run", tmp_path / "empty.yaml"
    config.write_text("{}\n")
    with hosts.namespaces() as network:
        lines = ["--config", str(config), *arguments(photos, run, *changes)]
        found = hosts.cut_off(network, lines, run, tmp_path, step=25)
        print(f"rank gone after {found.ranks_gone:.1f} s, torchrun after {found.agent_gone:.1f} s")
    hosts.check_cut_off(found, run, hosts.losses(alone))
    assert "2 x cpu" in found.said


@pytest.mark.usefixtures("_namespaces")
def test_namespaces_are_gone_after_a_failure():
    with pytest.raises(RuntimeError), hosts.namespaces() as network:  # noqa: PT012
        assert network.host(0) in hosts.ip("netns", "list")
        raise RuntimeError
    assert network.name not in hosts.ip("netns", "list")
