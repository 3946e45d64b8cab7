"""The port at which the processes of a machine meet stays theirs until they do."""

import socket

from longctx.launch import ports


def test_nobody_is_given_it_by_chance():
    first, last = map(int, ports.RANGE.read_text().split())
    for port in (ports.free_port() for _ in range(50)):
        assert not first <= port <= last
        socket.create_server(("127.0.0.1", port)).close()


def test_a_port_in_use_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(ports, "RANGE", tmp_path / "range")
    ports.RANGE.write_text("1 2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "LOWEST", port)
        monkeypatch.setattr(ports, "HIGHEST", port)
        assert ports.free_port() != port


def test_where_the_kernel_hands_out_all_ports_it_is_asked_for_one(monkeypatch, tmp_path):
    monkeypatch.setattr(ports, "RANGE", tmp_path / "range")
    ports.RANGE.write_text("1024\t65535\n")
    socket.create_server(("127.0.0.1", ports.free_port())).close()
