"""Instructions that stand before a question about a picture, drawn by a sample's key.

Which category a sample is of follows LLaVA-JP's second stage: without a question its answer is a caption,
with one it is an answer to it; either is detailed where the answer has several sentences (Japanese: more than
one full stop for a caption, any for an answer). The sentences are plait's own.

>>> category("", "赤いりんご"), category("何色ですか?", "赤です。")
('caption', 'detailed_vqa')
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from plait.data.chat import Message, Picture, Sample, Text
from plait.tokens.templates import words

STOPS = {"ja": "。", "en": "."}

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
    stops = answer.strip().count(STOPS[language])
    if not question.strip():
        return "detailed_caption" if stops > 1 else "caption"
    return "detailed_vqa" if stops else "vqa"


def drawn(key: str, question: str, answer: str, language: str) -> str:
    """An instruction of the sample's category; equal keys draw equal ones."""
    among = INSTRUCTIONS[language][category(question, answer, language)]
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return among[number % len(among)]


def reduced(sample: Sample) -> Sample:
    """The conversation with users' turns reduced to their pictures, a line each."""
    return replace(sample, messages=tuple(_reduced(message) for message in sample.messages))


def instructed(sample: Sample, key: str, language: str) -> Sample:
    """The conversation with a drawn instruction in its first user's turn: pictures, instruction, question."""
    turns = list(sample.messages)
    first = next((n for n, message in enumerate(turns) if message.role == "user"), None)
    if first is None:
        return sample
    answer = next((words(turn) for turn in turns[first + 1 :] if turn.role == "assistant"), "")
    question = words(turns[first]).strip("\n")
    instruction = drawn(key, question, answer, language)
    pictures = [part for part in turns[first].parts if isinstance(part, Picture)]
    lines: list[Picture | Text] = [each for picture in pictures for each in (picture, Text("\n"))]
    turns[first] = Message("user", (*lines, Text(instruction + question)))
    return replace(sample, messages=tuple(turns))


def _reduced(message: Message) -> Message:
    if message.role != "user":
        return message
    pictures = [part for part in message.parts if isinstance(part, Picture)]
    return Message("user", tuple(each for picture in pictures for each in (picture, Text("\n"))))
