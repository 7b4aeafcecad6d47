"""Documents of every kind as text, and those that hold none."""

import zipfile

import pytest

from opcd.queries.documents import read_documents
from opcd.runtime.errors import UserError

PDF = """%PDF-1.4
1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj
2 0 obj <</Type/Pages/Kids[3 0 R]/Count 1>> endobj
3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>> endobj
4 0 obj <</Length {length}>> stream
{stream}
endstream endobj
5 0 obj <</Type/Font/Subtype/Type1/BaseFont/Helvetica>> endobj
trailer <</Root 1 0 R>>
"""
DOCX = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/word/document.xml" ContentType='
    '"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="word/document.xml"/></Relationships>',
    "word/document.xml": '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>'
    "<w:p><w:r><w:t>The ferry sails to Marrow Island.</w:t></w:r></w:p></w:body></w:document>",
}


def text_of(file) -> str:
    (document,) = read_documents([str(file)])
    assert document.name == file.name
    return document.text


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.pdf", "a.docx"])
def test_every_kind_gives_its_text(tmp_path, name):
    pytest.importorskip("markitdown")
    file, sentence = tmp_path / name, "The ferry sails to Marrow Island."
    if name.endswith("pdf"):
        stream = f"BT /F1 12 Tf 20 100 Td ({sentence}) Tj ET"
        file.write_text(PDF.format(length=len(stream), stream=stream))
    elif name.endswith("docx"):
        with zipfile.ZipFile(file, "w") as archive:
            for path, content in DOCX.items():
                archive.writestr(path, content)
    else:
        file.write_text(f"<p>{sentence}</p>" if name.endswith("html") else sentence)
    assert sentence in text_of(file)


def test_a_page_without_text_is_refused_with_the_remedy(tmp_path):
    pytest.importorskip("markitdown")
    file = tmp_path / "scan.pdf"
    file.write_text(PDF.format(length=0, stream=""))
    with pytest.raises(UserError, match=r"scan.pdf holds no text; a scanned PDF must go through text recognition"):
        read_documents([str(file)])


def test_a_file_that_is_not_what_its_name_says(tmp_path):
    pytest.importorskip("markitdown")
    for name, content in (("broken.docx", b"PK\x03\x04 not a document"), ("text.pdf", b"a text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read as {name[-4:].strip('.').upper()}"):
            read_documents([str(tmp_path / name)])


def test_empty_missing_and_twice(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        read_documents([str(tmp_path / "empty.txt")])
    with pytest.raises(UserError, match="--context"):
        read_documents([str(tmp_path / "nothing.txt")])
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        (folder / "a.txt").write_text("A ferry sails.")
    with pytest.raises(UserError, match=r"two files are called a\.txt"):
        read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b/a.txt")])
