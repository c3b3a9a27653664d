"""What a compiled kernel may need. Shared by the test suite and by the long sweep."""

from support.cases import Compilation, meta

from archcompass.kernels.aot import Compiled, compiling

SLOWEST_COMPILE_SECONDS = 60


def compiled(case: Compilation, capability: int) -> list[Compiled]:
    """Every kernel the case launches, compiled for one compute capability."""
    with compiling(capability) as done:
        case.launch(meta)
    return done


def faults(case: Compilation, kernels: list[Compiled]) -> list[str]:
    """What is wrong with the compiled kernels of a case, one line each."""
    found = [] if kernels else ["nothing was launched"]
    for kernel in kernels:
        where = f"{kernel.kernel} sm_{kernel.capability} [{kernel.options}]"
        allowed = case.spill_bytes.get(f"{kernel.kernel}@{kernel.capability}", case.spill_bytes.get(kernel.kernel, 0))
        if not kernel.fits:
            found.append(f"{where}: {kernel.shared_bytes} B of shared memory, {kernel.shared_limit_bytes} B there")
        if not kernel.launches:
            found.append(f"{where}: no GPU takes the grid {kernel.grid}")
        if kernel.spill_bytes > allowed:
            found.append(f"{where}: spills {kernel.spill_bytes} B, {allowed} B allowed")
        if kernel.kernel in case.dots and not kernel.tensor_core_instructions:
            found.append(f"{where}: no tensor core instruction")
        if kernel.compile_seconds > SLOWEST_COMPILE_SECONDS:
            found.append(f"{where}: took {kernel.compile_seconds:.0f} s to compile")
    missing = case.dots - {kernel.kernel for kernel in kernels}
    return found + [f"{name}: said to be launched, and was not" for name in sorted(missing)]
