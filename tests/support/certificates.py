"""Certificates as deploy/mosquitto/README.md makes them, with keys that are quicker to make."""

import subprocess
from pathlib import Path
from typing import Final

KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(folder: Path, *arguments: str) -> None:
    """Run openssl in a folder."""
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def make_authority(folder: Path, name: str) -> None:
    """NAME.pem and NAME.key, which sign others."""
    openssl(
        folder, "req", "-x509", *KEY, "-subj", f"/CN=edgelm {name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"
    )


def make_certificate(folder: Path, name: str, subject: str, *, authority: str, names: str = "") -> None:
    """NAME.pem and NAME.key. names: of a server, as in subjectAltName."""
    openssl(folder, "req", *KEY, "-subj", f"/CN={subject}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
    signed = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial", "-out", f"{name}.pem"]
    if names:
        (folder / "san.cnf").write_text(f"subjectAltName={names}")
        signed += ["-extfile", "san.cnf"]
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signed)
