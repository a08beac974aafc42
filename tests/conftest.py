"""Options, determinism, visible progress and the closing table of `pytest -k paper`.

Tests run in as many processes as there are cores (pytest-xdist), each with one thread: the bits of a result then do
not depend on the number of cores. Claims on the reference model are spread over them and share what they evaluate.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from requant.catalog.ledger import record, records_json
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import NOT_RUN, Measurement
from requant.catalog.sharing import session

MEASUREMENTS = pytest.StashKey[list[Measurement]]()
PROPERTY = "measurement"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("requant")
    group.addoption("--claims-json", metavar="FILE", help="write one record a measured claim to FILE")
    group.addoption("--models-dir", metavar="DIR", help="folder of checkpoints: DIR/<organisation>/<name>")
    group.addoption("--download", action="store_true", help="fetch the checkpoints and data that claims name")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASUREMENTS] = []
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        _set_up_torch()  # not where the tests run in other processes, which begin the sooner
    config.pluginmanager.register(ClaimProgress(config))
    together = ExitStack()
    together.enter_context(session())  # of the first process; those it starts find it open
    config.add_cleanup(together.close)


def _set_up_torch() -> None:
    import torch

    if not torch.cuda.is_available():  # has to be there before triton is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from requant.catalog.parallel import one_thread

    one_thread()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-k paper`, alone or narrowed by `and`, opens no other test file: to import all takes longer than most claims."""
    only_claims = re.fullmatch(r"paper( and (\w+|\([^()]*\)))*", (config.option.keyword or "").strip())
    other = collection_path.suffix == ".py" and collection_path.stem != "test_paper_claims"
    return True if only_claims and other else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep `-k paper` exact: it selects the claims of papers and nothing else."""
    stray = [i.name for i in items if "paper" in i.name.lower() and i.path.stem != "test_paper_claims"]
    if stray:
        raise pytest.UsageError(f"only claims may be selected by `-k paper`; rename {', '.join(stray[:3])}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Tests that should share models and fixtures stay in one process, see `group_of`.

    The groups of pytest-xdist 3.8 are marks that it hides in node ids, where pytest 9.2 no longer reads them.
    """
    from xdist.scheduler import LoadScopeScheduling

    papers = load_catalog().papers.values()
    groups = {
        f"{paper.id}-{claim.id}": f"{paper.id}-{claim.group}" for paper in papers for claim in paper.claims
    }

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid, groups)

    return ByGroup(config, log)


def group_of(nodeid: str, groups: Mapping[str, str]) -> str:
    """A claim's tests go with those of its group, other tests with their file.

    Args:
        groups: test id of each claim -> its group.
    """
    file, _, test = nodeid.partition("::")
    return groups.get(test.partition("[")[2].removesuffix("]"), file)


def _measurement(report: pytest.TestReport) -> Measurement | None:
    """The measurement a test of a claim made, which may have run in another process."""
    found = dict(report.user_properties).get(PROPERTY) if report.when == "call" else None
    return None if found is None else Measurement(**found)


class ClaimProgress:
    """One line a measured claim, in place of a dot; claims that are not run keep their letter."""

    def __init__(self, config: pytest.Config):
        self.config = config

    def _line(self, report: pytest.TestReport) -> Measurement | None:
        item = _measurement(report)
        loud = self.config.get_verbosity() == 0 and item is not None and item.state != NOT_RUN
        return item if loud or (item is not None and item.failed) else None

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self, report: pytest.TestReport):
        category, letter, word = yield
        return (category, "", "") if self._line(report) else (category, letter, word)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        item = _measurement(report)
        if item is None:
            return
        self.config.stash[MEASUREMENTS].append(item)
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal and self._line(report):
            # the writer itself, so that pytest does not repeat the file name before every line
            colour = {"red": not item.ok, "green": item.ok and item.state == "reproduced"}
            terminal._tw.write(f"\n  {item.paper}-{item.claim} ")
            terminal._tw.write(f"{item.state} {item.seconds:.1f} s", **colour)


@pytest.fixture
def keep(request: pytest.FixtureRequest):
    """Function that keeps a measurement for the closing table, also from another process."""
    return lambda item: request.node.user_properties.append((PROPERTY, record(item)))


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    done = sorted(
        config.stash[MEASUREMENTS], key=lambda item: item.paper
    )  # claims of one entry stay in order
    if not done:
        return
    from rich.console import Console

    from requant.catalog.files import write_atomic
    from requant.catalog.report import print_report

    writer = terminalreporter._tw
    console = Console(
        file=writer._file,
        force_terminal=writer.hasmarkup,
        no_color=not writer.hasmarkup,
        width=max(writer.fullwidth, 120),
        highlight=False,
    )
    terminalreporter.section("claims")
    print_report(done, console)
    target = config.getoption("--claims-json")
    if target:
        write_atomic(Path(target), records_json(done))
