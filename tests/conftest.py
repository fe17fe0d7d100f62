"""How the tests are shared out over processes (pytest -n): one by one, but a module whose tests share what takes long
to make goes to one process as a whole. --dist loadgroup is meant for that, but pytest-xdist 3.8 marks tests in a way
that pytest 9 no longer reads.
"""

from xdist.scheduler import LoadScopeScheduling

TOGETHER = """
bagel/test_commands bagel/test_guide dit/test_commands dit/test_use multimodal/test_checkpoints
multimodal/test_contrastive multimodal/test_embed multimodal/test_ranks multimodal/test_train opens2v/test_export
opens2v/test_presets opens2v/test_runs opens2v/test_train roads/test_roads shared/test_sharded shared/test_strategies
""".split()


class Together(LoadScopeScheduling):
    """Modules of TOGETHER first, the one with most tests before the others; then all other tests, each on its own."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")
        return module if module in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config, log):
    return Together(config, log)
