"""A PKCS#11 token in software: SoftHSM, as installed or as ``scripts/softhsm.sh`` unpacks it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from demo.fleet import ROOT

PIN = "123456"
KEY_NUMBER = 2
"""PIV's slot for signatures, which securesystemslib takes by default."""

_MAKE_KEY = """
import os, sys, pkcs11
from pkcs11.util.ec import encode_named_curve_parameters
token = pkcs11.lib(os.environ["PYKCS11LIB"]).get_token(token_label=sys.argv[1])
with token.open(rw=True, user_pin=sys.argv[2]) as session:
    curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
    parameters.generate_keypair(id=bytes([int(sys.argv[3])]), label="signature", store=True)
"""


class Token:
    """An initialised token called ``label`` that holds a P-256 key; ``environment`` leads programs to it."""

    def __init__(self, folder: Path, label: str) -> None:
        tokens = folder / "tokens"
        tokens.mkdir(parents=True)
        configuration = folder / "softhsm2.conf"
        configuration.write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
        program, driver = find_softhsm()
        self.uri = f"hsm:{KEY_NUMBER}?label={label}"
        self.environment = {"SOFTHSM2_CONF": str(configuration), "PYKCS11LIB": str(driver)}
        words = ["--module", str(driver), "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", PIN * 2]
        subprocess.run([program, *words], check=True, env=self.environment, capture_output=True, timeout=60)
        make_key = [sys.executable, "-c", _MAKE_KEY, label, PIN, str(KEY_NUMBER)]
        subprocess.run(make_key, check=True, env=self.environment, timeout=60)


def find_softhsm() -> tuple[str, Path]:
    """Return SoftHSM's tool and its driver.

    Raises:
        FileNotFoundError: ``scripts/softhsm.sh`` unpacks them.
    """
    installed, driver = shutil.which("softhsm2-util"), Path("/usr/lib/softhsm/libsofthsm2.so")
    if installed is not None and driver.exists():
        return installed, driver
    unpacked = ROOT / ".softhsm/usr"
    if not (unpacked / "bin/softhsm2-util").exists():
        raise FileNotFoundError("SoftHSM is missing: run scripts/softhsm.sh, as `make test` does")
    return str(unpacked / "bin/softhsm2-util"), unpacked / "lib/softhsm/libsofthsm2.so"
