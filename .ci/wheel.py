"""Exits with an error unless the installed fxbt runs the kernels that its wheel brought, with no compiler to be found.

`make test-wheel` runs it in an environment of its own, for each processor that this machine can be taken for.
"""

import shutil
import tempfile
from pathlib import Path

import torch

import fxbt
from fxbt.kernels import autotune, native, shipped

capability = torch.backends.cpu.get_cpu_capability()
package = Path(fxbt.__file__).parent
assert "site-packages" in package.parts, f"{package} is no installed fxbt"
assert shutil.which("cc") is None and shutil.which("gcc") is None, "there is a compiler"
assert capability in ("AVX2", "AVX512"), f"wheels have no kernels for a processor that torch takes for {capability}"
library = native.library()
assert library is not None, f"no kernels: {native.obstacle()}"
assert library.path.parent == package / "kernels", f"the kernels come from {library.path}"

assert shipped.FILE.parent == package / "kernels", f"the table of kernels is {shipped.FILE}"
assert shipped._machines(shipped.FILE, autotune.FORMAT), "no table of kernels"

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).eval()
x = torch.randn(5, 64)
with torch.no_grad():
    expected, fast = model(x), fxbt.optimize(model)
    for _ in range(2):
        torch.testing.assert_close(fast(x), expected)
assert fast.report.latest is not None, fast.report
kernels = fast.report.latest.kernels
linears = [answer for name, answer in kernels.items() if name.startswith("linear")]
assert len(linears) == 2, kernels
assert all(answer.startswith("native") for answer in linears), kernels  # by rule, as nothing is measured here
kept = [path for path in Path.home().rglob("*") if path.is_file()]
assert not kept, f"something was compiled or measured: {kept}"
left = list(Path(tempfile.gettempdir()).glob("fxbt-*"))
assert not left, f"something was compiled: {left}"
print(f"{capability}: the wheel's kernels run: {library.path.name}, {kernels}")
