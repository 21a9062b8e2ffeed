"""Instructions that stand before a question about a picture, drawn by a sample's key.

Which category a sample is of follows LLaVA-JP's second stage: without a question its answer is a caption,
with one it is an answer to it; either is detailed where the answer has several sentences (Japanese: more than
one full stop for a caption, any for an answer). A turn without a picture gets no instruction: all of them
speak of one. The sentences are plait's own.

>>> category("", "赤いりんご"), category("何色ですか?", "赤です。")
('caption', 'detailed_vqa')
"""

import hashlib
import re
from collections.abc import Mapping

from msgspec.structs import replace

from plait.data.chat import Message, Part, Picture, Sample, Text
from plait.tokens.templates import words

STOPS = {"ja": re.compile("。"), "en": re.compile(r"\.(?=\s|$)")}
"""The end of a sentence; the point of 3.5 is none."""
BETWEEN = {"ja": "", "en": " "}
"""What parts an instruction from the question behind it."""

INSTRUCTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "ja": {
        "caption": (
            "この画像に短い説明をつけてください。",
            "写っているものを一言で表してください。",
            "画像の内容を簡潔に述べてください。",
            "この絵は何を表していますか。手短に答えてください。",
            "画像にふさわしい見出しを書いてください。",
            "何が描かれているか、短くまとめてください。",
            "この一枚を短い言葉で紹介してください。",
            "画像の主題を一文以内で示してください。",
            "見えるものの名前を挙げてください。",
            "この画像の題名を考えてください。",
            "ひと目で分かることを簡単に書いてください。",
            "画像を短い語句で言い表してください。",
        ),
        "detailed_caption": (
            "この画像を詳しく説明してください。",
            "写っているものや様子を、順を追って述べてください。",
            "画像の細部まで文章で描写してください。",
            "この場面を知らない人にも伝わるように説明してください。",
            "画像から読み取れることを、できるだけ多く書いてください。",
            "色や形、位置関係にも触れながら説明してください。",
            "画像の全体と細部を、それぞれ文章にしてください。",
            "この絵に何がどのように描かれているか、丁寧に述べてください。",
            "見たままを、いくつかの文で詳しく書いてください。",
            "画像の内容を、背景も含めて説明してください。",
            "目の前にあるつもりで、この画像を描写してください。",
            "画像について、気づいたことを詳しく述べてください。",
            "この一枚の様子を、数文で伝えてください。",
            "主なものとその周りを、分けて詳しく説明してください。",
        ),
        "vqa": (
            "画像を見て、次の質問に短く答えてください。",
            "次の問いに一言で答えてください。",
            "画像をもとに、質問の答えだけを書いてください。",
            "以下の質問に、画像から分かる範囲で手短に答えてください。",
            "画像についての質問です。簡潔に答えてください。",
            "次の質問の答えを、単語か短い句で示してください。",
            "画像をよく見て、問いに端的に答えてください。",
            "質問に対する答えを短くまとめてください。",
            "説明は要りません。次の質問に答えてください。",
            "画像に基づいて、下の問いに短い言葉で答えてください。",
            "次のことを画像から読み取り、短く答えてください。",
            "この画像について尋ねます。ひと言でどうぞ。",
            "画像を参照し、質問への回答だけを述べてください。",
            "答えを簡単に書いてください。",
        ),
        "detailed_vqa": (
            "画像を見て、次の質問に文章で詳しく答えてください。",
            "次の問いに、理由も添えて答えてください。",
            "画像をもとに、質問への答えを丁寧に説明してください。",
            "以下の質問に、画像の様子に触れながら答えてください。",
            "画像についての質問です。筋道を立てて答えてください。",
            "次の質問に、分かることをすべて含めて答えてください。",
            "画像をよく観察し、問いに十分な説明で答えてください。",
            "質問の答えを、根拠とともに文章で書いてください。",
            "この画像について尋ねます。詳しく教えてください。",
        ),
    },
    "en": {
        "caption": (
            "Name what the picture shows.",
            "Give the picture a short caption.",
            "Say in a few words what you see.",
        ),
        "detailed_caption": (
            "Describe the picture in detail.",
            "Write several sentences about what the picture shows.",
            "Describe the whole picture, then its parts.",
        ),
        "vqa": (
            "Answer the question about the picture in a few words.",
            "Look at the picture and answer briefly.",
            "Give only the answer to this question.",
        ),
        "detailed_vqa": (
            "Answer the question about the picture in full sentences.",
            "Look at the picture, then answer and give your reasons.",
            "Explain your answer to this question by what the picture shows.",
        ),
    },
}


def category(question: str, answer: str, language: str = "ja") -> str:
    """The category of a sample."""
    stops = len(STOPS[language].findall(answer.strip()))
    if not question.strip():
        return "detailed_caption" if stops > 1 else "caption"
    return "detailed_vqa" if stops else "vqa"


def drawn(key: str, question: str, answer: str, language: str) -> str:
    """An instruction of the sample's category; equal keys draw equal ones."""
    among = INSTRUCTIONS[language][category(question, answer, language)]
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return among[number % len(among)]


def reduced(sample: Sample) -> Sample:
    """The conversation with users' turns reduced to their pictures, a line each; those without stay."""
    return replace(sample, messages=tuple(_reduced(message) for message in sample.messages))


def instructed(sample: Sample, key: str, language: str) -> Sample:
    """The conversation with a drawn instruction in its first user's turn, if that has a picture.

    Pictures stand before it, a line each, and the question behind it. Where texts stand between pictures, all
    of the turn follows the instruction as it is.
    """
    turns = list(sample.messages)
    first = next((n for n, message in enumerate(turns) if message.role == "user"), None)
    if first is None or not _lines(turns[first]):
        return sample
    answer = next((words(turn) for turn in turns[first + 1 :] if turn.role == "assistant"), "")
    turns[first] = _told(turns[first], key, answer, language)
    return replace(sample, messages=tuple(turns))


def _told(message: Message, key: str, answer: str, language: str) -> Message:
    texts = [part.text for part in message.parts if isinstance(part, Text)]
    question = "".join(texts).strip("\n")
    instruction = drawn(key, question, answer, language) + (BETWEEN[language] if question else "")
    if len(texts) > 1:
        return Message("user", (Text(instruction), *message.parts))
    return Message("user", (*_lines(message), Text(instruction + question)))


def _reduced(message: Message) -> Message:
    shown = _lines(message)
    return Message("user", shown) if shown and message.role == "user" else message


def _lines(message: Message) -> tuple[Part, ...]:
    """The pictures of a turn, a line each."""
    pictures = [part for part in message.parts if isinstance(part, Picture)]
    return tuple(each for picture in pictures for each in (picture, Text("\n")))
