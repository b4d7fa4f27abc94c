import math

from tercet.report.text import curly, duration, percent, plain, short, signed, tenths


def test_numbers_as_a_reader_sees_them() -> None:
    shown = {
        0: "0",
        0.0456: "0.0456",
        1.234: "1.23",
        12.34: "12.3",
        1234.5: "1\u202f234",
        2.0: "2",
        -1.5: "\u22121.50",
        2e-6: "2.0e\u22126",
    }
    assert {value: short(value) for value in shown} == shown
    assert short(math.nan) == "not a number" and signed(1.5) == "+1.50" and signed(-1.5) == "\u22121.50" and signed(0) == "0"
    assert percent(0.861) == "86.1\u202f%" and percent(0.5) == "50\u202f%" and tenths(0.5) == "50.0\u202f%"
    assert duration(3.21) == "3.2\u202fs" and duration(125) == "2\u202fmin" and duration(3725) == "1\u202fh 2\u202fmin"
    assert curly("PPO's 95 % interval") == "PPO\u2019s 95\u202f%\u00a0interval"


def test_any_field_of_the_data_becomes_text() -> None:
    assert plain([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], 99) == "user: hi\nassistant: yo"
    assert plain({"a": [1, "ü"]}, 99) == '{"a": [1, "ü"]}' and plain(None, 9) == "" and plain(3, 9) == "3"
    assert plain("a\x00b\x1b\r\nc\td", 99) == "a\u2400b\u241b\nc\td"
    assert plain("\ud800x", 99) == "?x"
    assert plain("1,2,3,4", 3) == "1,2 … [4 more characters]"
