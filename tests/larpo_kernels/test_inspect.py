"""What the compiler makes of the kernels, for GPUs that are not here; and that the reading of machine code can be trusted.

Kernels are compiled in one process of its own, because this one runs them in Triton's interpreter. It takes a sample;
`python -m larpo_kernels.inspect` goes through everything.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

from filelock import FileLock

from larpo_kernels import inspect
from larpo_kernels.backends.triton import launch
from larpo_kernels.inspect import cases, disassembly, loops, targets
from larpo_kernels.inspect.loops import Instruction
from tests.helpers import HANGS

# targets, kernels, dtypes: every kernel on one NVIDIA and one AMD target, what is hot on all of them
SAMPLE = (
    (["sm_90", "gfx942"], ["*/plain", "candidate_logps/mean", "list_losses/contrastive"], ["bf16"]),
    (["sm_80", "sm_100"], ["token_logps_*/plain", "exp_tile/plain"], ["bf16"]),
    (["sm_80"], ["list_losses/lambdarank-dcg2"], ["bf16"]),  # the one closest to spilling
    (["sm_90"], ["token_logps_*/plain"], ["fp16", "fp32"]),
    (["sm_90"], ["token_logps_*/softcap", "token_logps_forward/split-stats", "exp_tile/again"], ["bf16"]),
)
ROW_KERNELS = ("token_logps_forward", "token_logps_backward")

COMPILE = """
    import json, sys
    from larpo_kernels import inspect
    reports = [inspect.report(*sample).as_dict() for sample in json.loads(sys.argv[1])]
    skipped = {target: reason for report in reports for target, reason in report["skipped"].items()}
    kernels = [kernel for report in reports for kernel in report["kernels"]]

    from larpo_kernels.backends.triton import lists
    lists.TOKENS = 32768  # 256 of them in a thread
    crammed = inspect.report(["sm_90", "gfx942"], ["candidate_logps/sum"]).as_dict()["kernels"]
    with open(sys.argv[2], "w") as file:
        json.dump({"skipped": skipped, "kernels": kernels, "crammed": crammed}, file)
"""


def run(*arguments, **environment):
    """A Python process in which kernels are compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=HANGS)


@pytest.fixture(scope="session")
def inspected(tmp_path_factory):
    """The sample's report, compiled once for all tests, and for all workers of this run."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if shared else tmp_path_factory.mktemp("inspect")
    file = folder / "inspected.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            done = run("-c", textwrap.dedent(COMPILE), json.dumps(SAMPLE), str(file))
            assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture(params=targets.TARGETS)
def kernels(request, inspected):
    """Reports on one target."""
    if request.param in inspected["skipped"]:
        pytest.skip(inspected["skipped"][request.param])
    return [kernel for kernel in inspected["kernels"] if kernel["target"] == request.param]


def name(kernel):
    return f"{kernel['kernel']}/{kernel['variant']} {kernel['dtype']} {'' if kernel['aligned'] else 'odd '}{kernel['target']}"


# --- the kernels


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_or_local_memory_within_shared_memory(kernels):
    assert {name(kernel): kernel["problems"] for kernel in kernels if kernel["problems"]} == {}
    assert kernels


@pytest.mark.slow
def test_row_kernels_move_16_bytes_at_a_time_where_rows_are_aligned(kernels):
    checked = [kernel for kernel in kernels if kernel["kernel"] in ROW_KERNELS and kernel["aligned"] and not kernel["error"]]
    for kernel in checked:
        loop = kernel["main_loop"]
        assert set(loop["loads"]) == {"16"}, name(kernel)
        assert set(loop["stores"]) == ({"16"} if kernel["kernel"] == "token_logps_backward" else set()), name(kernel)
    assert {kernel["kernel"] for kernel in checked} == set(ROW_KERNELS)


@pytest.mark.slow
def test_zeroing_an_ignored_row_stores_16_bytes_at_a_time(kernels):
    backwards = [kernel for kernel in kernels if kernel["kernel"] == "token_logps_backward" and kernel["aligned"]]
    for kernel in backwards:
        zeroing = [loop for loop in kernel["loops"] if loop["stores"] and not loop["loads"]]
        assert zeroing and all(set(loop["stores"]) == {"16"} for loop in zeroing), name(kernel)
    assert backwards


@pytest.mark.slow
def test_tiles_of_the_head_move_16_bytes_at_a_time(kernels):
    tiles = [kernel for kernel in kernels if kernel["kernel"] == "exp_tile" and kernel["aligned"]]
    for kernel in tiles:
        assert set(kernel["main_loop"]["loads"]) == set(kernel["main_loop"]["stores"]) == {"16"}, name(kernel)
    assert tiles


@pytest.mark.slow
def test_row_kernels_form_one_exp_per_logit_and_two_with_a_soft_cap(kernels):
    rows = [kernel for kernel in kernels if kernel["kernel"] in ROW_KERNELS and not kernel["error"]]
    for kernel in rows:
        assert kernel["exps_per_element"] == (2 if kernel["variant"] == "softcap" else 1), name(kernel)
        assert kernel["main_loop"]["exps"] >= 8, name(kernel)
    assert {kernel["kernel"] for kernel in rows} == set(ROW_KERNELS)


@pytest.mark.slow
def test_moving_the_logits_takes_longer_than_issuing_what_is_done_to_them(inspected):
    """An H200 issues 4 warps of 32 a cycle on each of 132 multiprocessors, at 1.755 GHz, while 4.8 TB/s move."""
    per_byte = 132 * 4 * 32 * 1.755e9 / 4.8e12
    moved = {"token_logps_forward/plain": 1, "token_logps_backward/plain": 2, "exp_tile/plain": 2, "exp_tile/again": 2}
    checked = set()
    for kernel in inspected["kernels"]:
        which = f"{kernel['kernel']}/{kernel['variant']}"
        if which in moved and kernel["target"] == "sm_90" and kernel["aligned"]:
            most = 0.7 * per_byte * moved[which] * kernel["itemsize"]
            assert kernel["instructions_per_element"] <= most, name(kernel)
            checked.add(which)
    assert checked == set(moved) or "sm_90" in inspected["skipped"]


@pytest.mark.slow
def test_misaligned_rows_are_reported_as_narrow(kernels):
    """The report tells the two apart, or the test of the aligned ones would say nothing."""
    odd = [kernel for kernel in kernels if kernel["kernel"] in ROW_KERNELS and not kernel["aligned"]]
    for kernel in odd:
        assert max(map(int, kernel["main_loop"]["loads"])) == {"bf16": 2, "fp16": 2, "fp32": 4}[kernel["dtype"]], name(kernel)
    assert odd


@pytest.mark.slow
def test_launches_are_those_of_the_table(kernels):
    for kernel in kernels:
        shipped = launch.TABLE[kernel["target"]]
        expected = {
            "token_logps_forward": shipped.row_warps,
            "token_logps_backward": shipped.row_warps,
            "exp_tile": shipped.tile_warps,
        }
        assert kernel["error"] or kernel["warps"] == expected.get(kernel["kernel"], kernel["warps"]), name(kernel)


def test_every_kernel_that_the_backend_starts_is_in_the_table_of_cases():
    started = set()
    for file in Path(launch.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Subscript(value=ast.Attribute(attr=kernel))):  # module.kernel[grid](...)
                    started.add(kernel)
    assert started == {kernel.name for kernel in cases.KERNELS}


def test_every_target_has_launch_parameters_and_every_launch_parameter_a_target():
    assert set(targets.TARGETS) == set(launch.TABLE)


# --- the report


@pytest.mark.slow
def test_a_kernel_that_spills_is_a_problem(inspected):
    """A kernel with far too much in registers: what the first test would not let pass."""
    for kernel in inspected["crammed"]:
        assert kernel["error"] is None and kernel["spills"] > 0 and kernel["local_bytes"] > 0, name(kernel)
        assert [problem.split()[0] for problem in kernel["problems"]] == ["spills", "uses"]
    assert inspected["crammed"] or len(inspected["skipped"]) > 1


def test_the_interpreter_is_refused_in_one_sentence():
    done = run("-m", "larpo_kernels.inspect", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["sm_1"],), "targets must be among ['sm_80', 'sm_90', 'sm_100', 'gfx942'], got 'sm_1'"),
        ((None, ["nothing*"]), "got 'nothing*'"),
        ((None, None, ["fp8"]), "dtypes must be among ['bf16', 'fp16', 'fp32'], got 'fp8'"),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect.report(*arguments)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "report.json"
    names = ("--target", "sm_90", "--kernel", "merge_splits/plain", "--dtype", "bf16")
    done = run("-m", "larpo_kernels.inspect", *names, "--json", str(file))
    assert done.returncode == 0, done.stderr
    (kernel,) = json.loads(file.read_text())["kernels"]
    assert kernel["kernel"] == "merge_splits" and kernel["warps"] == 1 and kernel["registers"] > 0
    (line,) = [line for line in done.stdout.splitlines() if "merge_splits/plain" in line]
    assert {"bf16", "sm_90", str(kernel["registers"])} <= set(line.split())


def test_a_kernel_that_does_not_compile_is_a_line_of_the_table(capsys):
    command = importlib.import_module("larpo_kernels.inspect.__main__")
    failed = inspect.KernelReport("some_kernel", "plain", "sm_90", "bf16", False, error="reason")
    command.show([failed])
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["kernel", "logits", "target"]
    assert line.split() == ["some_kernel/plain", "bf16", "odd", "sm_90", "error"]


# --- reading machine code


def code(text):
    """One letter per instruction: 'a' plain, 'x:' a label before it, '>x' may jump to x, '!x' always jumps to x, '.' ends."""
    instructions = []
    for word in text.split():
        label, _, rest = word.rpartition(":")
        jump = rest[1:] if rest[0] in ">!" else None
        instructions.append(Instruction(rest, (label,) if label else (), jump, rest[0] not in "!."))
    return instructions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b .", []),
        ("a x:b c >x .", [("b c >x", "b c >x")]),
        ("a x:b y:c >y d >x .", [("b d >x", "b d >x"), ("c >y", "c >y")]),
        # rare code behind the end belongs to its loop, but not every turn runs it, nor what it leaves out
        ("a x:b >z c >x d . z:e !x", [("b >z c >x e !x", "b >z")]),
        ("a x:b >z c z:d >x .", [("b >z c d >x", "b >z d >x")]),
        ("a >r x:b c . r:d !x", []),  # rare code that jumps back to where the usual way goes on
        ("a . x:b !x", []),  # padding that nothing leads to
        ("", []),
    ],
)
def test_a_loop_is_what_can_come_round_again(text, expected):
    found = loops.loops(code(text))
    assert [tuple(" ".join(x.opcode for x in part) for part in body) for body in found] == expected


def test_lines_of_nvdisasm_become_instructions():
    text = """
.L_x_2:
        /*0ac0*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0bf0*/                   MUFU.EX2 R9, R9 ;                       /* 0x00 */
        /*1880*/                   BRA.U !UP0, `(.L_x_2) ;
        /*2330*/                   BRA.DIV ~URZ, `(.L_x_6) ;
        /*1890*/              @P0  EXIT ;
.L_x_6:
        /*1900*/                   BRA `(.L_x_2);
    """
    assert disassembly.nvidia_instructions(text) == [
        Instruction("LDG.E.128", (".L_x_2",)),
        Instruction("MUFU.EX2"),
        Instruction("BRA.U", jump=".L_x_2"),
        Instruction("BRA.DIV", jump=".L_x_6"),
        Instruction("EXIT"),
        Instruction("BRA", (".L_x_6",), jump=".L_x_2", falls_through=False),
    ]


def test_lines_of_amd_assembly_become_instructions():
    text = """
; %bb.0:
.LBB0_1:                                ; %loop
	.loc	1 2 3
	buffer_load_dwordx4 v[24:27], v24, s[20:23], 0 offen
	v_exp_f32_e32 v24, v24
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_1                        ; comment
	s_endpgm
.Lfunc_end0:
	s_nop 0
    """
    assert disassembly.amd_instructions(text) == [
        Instruction("buffer_load_dwordx4", (".LBB0_1",)),
        Instruction("v_exp_f32_e32"),
        Instruction("s_cbranch_scc1", jump=".LBB0_1"),
        Instruction("s_branch", jump=".LBB0_1", falls_through=False),
        Instruction("s_endpgm", falls_through=False),
    ]


@pytest.mark.parametrize(
    ("opcode", "access"),
    [
        ("LDG.E.128.CONSTANT", ("load", 16)),
        ("LDG.E.ENL2.256", ("load", 32)),
        ("LDG.E.64", ("load", 8)),
        ("LDG.E", ("load", 4)),
        ("LDG.E.U16", ("load", 2)),
        ("LDGSTS.E.BYPASS.128", ("load", 16)),
        ("STG.E.U8", ("store", 1)),
        ("STG.E.128", ("store", 16)),
        ("LDS.128", None),
        ("LDL.64", None),
        ("MUFU.EX2", None),
        ("global_load_dwordx4", ("load", 16)),
        ("buffer_load_dwordx2", ("load", 8)),
        ("global_load_dword", ("load", 4)),
        ("global_load_ushort", ("load", 2)),
        ("buffer_load_short_d16_hi", ("load", 2)),
        ("buffer_store_byte", ("store", 1)),
        ("ds_read_b32", None),
        ("s_load_dwordx4", None),
    ],
)
def test_width_of_a_global_access(opcode, access):
    nvidia = opcode.isupper()
    assert (disassembly.nvidia_access if nvidia else disassembly.amd_access)(opcode) == access


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "resident", "limit"),
    [
        ("sm_90", 32, 0, 8, 64, "warps"),
        ("sm_90", 64, 0, 8, 32, "registers"),  # 65536 / (64 * 32)
        ("sm_90", 255, 0, 4, 8, "registers"),
        ("sm_90", 16, 0, 1, 32, "programs"),
        ("sm_80", 32, 81 << 10, 8, 16, "shared memory"),  # two programs of 82 KB in 164 KB
        ("sm_80", 32, 82 << 10, 8, 8, "shared memory"),
        ("gfx942", 64, 0, 8, 32, "warps"),
        ("gfx942", 65, 0, 4, 28, "registers"),  # 512 / 72 on each of four SIMDs
        ("gfx942", 32, 64 << 10, 4, 4, "shared memory"),
    ],
)
def test_occupancy_by_hand(target, registers, shared, warps, resident, limit):
    found = targets.occupancy(targets.TARGETS[target], registers, shared, warps)
    assert (found.warps, found.limit) == (resident, limit)
