"""When ranks can be forked from a process that has imported everything, and that it is such a process."""

from __future__ import annotations

import subprocess
import sys
import threading

from comfy.taco_dit.core import template


def test_a_process_with_a_thread_is_unfit():
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="of a module")
    thread.start()
    try:
        assert "started the thread" in template._unfit()
    finally:
        over.set()
        thread.join()


def test_what_the_template_imports_starts_no_thread_and_uses_no_gpu():
    script = (
        "import importlib\nfrom comfy.taco_dit.core import template\n"
        "with template._without_cuda():\n    [importlib.import_module(name) for name in template._MODULES]\n"
        "print(repr(template._unfit()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "''"
