"""The patches fit the checkout that they name, and do in it what they say.

Set LLAVA_CHECKOUT to a checkout of haotian-liu/LLaVA at the patch's commit; it is copied, not changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[2] / "patches"
CHECKOUT = os.environ.get("LLAVA_CHECKOUT")
HASHES = {  # of the files after and before, and of the lines that are added
    "llava-c121f04.patch": {"fd487df": ("e3d5082", "83572c3c"), "0a1b68d": ("477c668", "136d63a8")},
    "llava-next-df17966.patch": {"2dae15b": ("704b960", "4dc89a3e"), "c530ae2": ("4c524be", "85a25dc8")},
}


@pytest.mark.parametrize("patch", sorted(PATCHES.glob("*.patch")), ids=lambda p: p.name)
def test_patches_carry_our_lines_alone(patch):
    """No line of the host's: additions without context, and hunk headers without the host's heading."""
    text = patch.read_text()
    assert re.search(r"\b[0-9a-f]{40}\b", text.split("diff --git")[0]), "the commit that it is for"
    for line in text[text.index("diff --git") :].splitlines():
        assert line.startswith(("diff --git", "index ", "--- a/", "+++ b/", "+")) or re.fullmatch(
            r"@@ -\d+,0 \+\d+(,\d+)? @@", line
        ), line


def parts_of(patch: Path) -> dict[str, tuple[str, str]]:
    """Hash after the patch → (hash before, digest of the hunks), of each file that the patch names."""
    found = {}
    for part in patch.read_text().split("diff --git ")[1:]:
        before, after = re.search(r"^index (\w+)\.\.(\w+)", part, re.M).groups()
        found[after] = before, hashlib.sha256(part[part.index("@@") :].encode()).hexdigest()[:8]
    return found


def test_the_hashes_are_of_these_lines():
    """Lines that changed without the hash of the file after them: apply.sh ended without a word, the checkout patched.

    The hashes were taken from patched checkouts by `git hash-object`. After a change of lines take them again.
    """
    assert {patch.name: parts_of(patch) for patch in PATCHES.glob("*.patch")} == HASHES


def test_a_patch_whose_hashes_are_wrong_is_told(tmp_path):
    """It ended with code 1 and no message."""
    folder, checkout = tmp_path / "patches", tmp_path / "checkout"
    folder.mkdir()
    checkout.mkdir()
    shutil.copy(PATCHES / "apply.sh", folder)
    (checkout / "x.py").write_text("import os\n")
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    before = subprocess.check_output(["git", "hash-object", str(checkout / "x.py")], text=True)[:7]
    text = f"For x at y.\n\ndiff --git a/x.py b/x.py\nindex {before}..1234567 100644\n--- a/x.py\n+++ b/x.py\n"
    (folder / "x.patch").write_text(f"{text}@@ -1,0 +2 @@\n+import sys\n")
    done = subprocess.run(["bash", str(folder / "apply.sh"), str(checkout)], capture_output=True, text=True)
    assert done.returncode == 1 and "x.patch was given to git" in done.stderr and "git checkout" in done.stderr


def test_a_checkout_that_no_patch_fits_is_told_what_does(tmp_path):
    """git itself applies additions without context to any file that is long enough, in the wrong place."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in ("train/train.py", "model/builder.py"):
        (tmp_path / "llava" / name).parent.mkdir(parents=True)
        (tmp_path / "llava" / name).write_text("import os\n" * 2000)
    command = ["bash", str(PATCHES / "apply.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    for word in ("no commit", "haotian-liu/LLaVA at c121f04", "LLaVA-NeXT at df17966", "fwd2bot llava train"):
        assert word in done.stderr


@pytest.mark.skipif(not CHECKOUT, reason="LLAVA_CHECKOUT names no checkout of haotian-liu/LLaVA")
def test_their_own_command_with_the_one_flag(tmp_path):
    """`git apply`, then LLaVA's script with --fwd2bot: trained, saved, and loaded by their own loader."""
    pytest.importorskip("shortuuid")
    sys.path.insert(0, str(Path(__file__).parent))
    from original_toys import clip_tower, conversations, on_disk
    from test_original_train import command

    from llava_fwd2bot.checkpoint.read import read_checkpoint

    checkout = tmp_path / "LLaVA"
    shutil.copytree(Path(CHECKOUT) / "llava", checkout / "llava")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # a folder of another repository, as in a monorepo
    done = subprocess.run(["bash", str(PATCHES / "apply.sh"), str(checkout)], capture_output=True, text=True)
    assert done.stdout.startswith("llava-c121f04.patch fits"), done.stderr
    for more, said in (("", "already"), ("--reverse", "fits"), ("--check", "fits"), ("", "fits")):
        again = subprocess.run(["bash", str(PATCHES / "apply.sh"), str(checkout), *more.split()], capture_output=True)
        assert again.returncode == 0 and said in again.stdout.decode()
    tower = clip_tower(tmp_path / "clip")
    toys = {"tower": tower, "base": on_disk(tmp_path / "llava-toy", tower), **conversations(tmp_path / "data")}
    run = command(toys, tmp_path / "llava-fwd2bot", "--fwd2bot", "4", "--num_train_epochs", "1")
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{PATCHES.parent}"}
    train = "import transformers.trainer as t, torch.nn as nn; t.ALL_LAYERNORM_LAYERS = [nn.LayerNorm]\n"
    train += "from llava.train.train import train; train()"
    subprocess.run([sys.executable, "-c", train, *run], cwd=checkout, env=environment, check=True)
    assert read_checkpoint(tmp_path / "llava-fwd2bot")["fwd2bot"].num_summary_tokens == 4
    load = "from llava.model.builder import load_pretrained_model as f; import sys\n"
    load += "print(f(sys.argv[1], None, 'llava', device='cpu')[1].fwd2bot_config.num_summary_tokens)"
    done = subprocess.run(
        [sys.executable, "-c", load, str(tmp_path / "llava-fwd2bot")],
        cwd=checkout,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("4")
