import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run side by side; more threads than cores make small operations wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start():
    """Whatever ran before it in the process, benchmarks for instance."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)
