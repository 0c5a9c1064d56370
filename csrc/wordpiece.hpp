// WordPiece: texts in, token ids out (Devlin et al. 2019, as Hugging Face's tokenizers define it). What its normalizer and
// pre-tokenizer make of a character is not known here: fastrank/wordpiece.py reads it off them and hands it over in pages.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastrank {

// Whole words of the vocabulary by their bytes: most words of a text are found here at once, others in the tree.
class WordTable {
 public:
  explicit WordTable(const std::vector<std::pair<std::string, int32_t>>& vocabulary);
  int32_t find(std::string_view word) const;  // -1 where there is no such word

 private:
  // Small, so that the words of a text find most of what they need in a cache.
  struct Slot {
    uint32_t hash = 0, place = 0;  // of the word's record, 0 for none
  };
  std::vector<Slot> slots_;  // open addressing, at most half full
  std::string records_;      // id, number of bytes, bytes
};

// The vocabulary as a tree of bytes.
class ByteTree {
 public:
  static constexpr uint32_t ROOT = 0, NONE = UINT32_MAX;

  ByteTree();
  void insert(std::string_view word, int32_t id);
  uint32_t step(uint32_t node, unsigned char byte) const {
    const uint32_t key = node << 8 | byte;
    for (uint32_t slot = hash(key) & mask_;; slot = (slot + 1) & mask_) {
      if (edges_[slot].key == key) return edges_[slot].child;
      if (edges_[slot].key == NONE) return NONE;
    }
  }
  uint32_t walk(std::string_view word) const;
  int32_t id(uint32_t node) const { return ids_[node]; }  // -1 where no word ends

 private:
  struct Edge {
    uint32_t key = NONE, child = 0;
  };
  static uint32_t hash(uint32_t key) { return key * 2654435769u ^ (key * 2654435769u >> 15); }
  void place(Edge edge);
  std::vector<Edge> edges_;  // open addressing, at most half full
  std::vector<int32_t> ids_;
  uint32_t mask_;
};

class WordPiece {
 public:
  // Bytes that UTF-8 never has, in the replacement of a character: a word ends here; the next character is a word of its own;
  // what becomes of this character depends on its neighbours.
  static constexpr unsigned char WORD_END = 0xFF, ALONE = 0xFE, DEPENDS = 0xFD;
  static constexpr uint32_t PAGE_SIZE = 256, NUM_PAGES = 0x110000 / PAGE_SIZE;

  enum class State : uint8_t { DONE, NEEDS_PAGES, LEFT };
  struct Encoded {
    std::vector<int32_t> ids;    // all texts', one after the other
    std::vector<int64_t> ends;   // of each text in `ids`; a text that is not DONE has none there
    std::vector<State> states;   // of each text
    std::vector<uint32_t> pages; // that texts need and nobody has set
  };

  // vocabulary: words in UTF-8 with their ids. continuation: what stands before a piece that does not begin a word ("##").
  // A word of more than max_characters is unknown. Texts that hold one of `left_to_reference` are left.
  WordPiece(const std::vector<std::pair<std::string, int32_t>>& vocabulary, const std::string& continuation, int32_t unknown_id,
            int64_t max_characters, std::vector<std::string> left_to_reference);

  // What characters [PAGE_SIZE page, PAGE_SIZE (page + 1)) become, in UTF-8 and the bytes above. A page that is set stays.
  // Page 0 comes before the first text.
  void set_page(uint32_t page, const std::vector<std::string>& replacements);

  // texts: valid UTF-8. enough: ids of a text past this many may be missing; negative: none.
  Encoded encode(const std::vector<std::string_view>& texts, int64_t enough, int num_threads) const;

 private:
  struct Page {
    std::array<uint32_t, PAGE_SIZE + 1> begins;
    std::string bytes;
  };
  struct Text;  // one that is being read
  void read(std::string_view bytes, int64_t enough, Text& text) const;
  void finish_word(Text& text) const;
  bool is_left(const char* bytes, const char* end) const;

  WordTable words_;
  ByteTree tree_;
  uint32_t continuation_;  // the node where pieces inside a word begin
  int32_t unknown_id_;
  int64_t max_characters_;
  std::vector<std::string> left_;
  std::array<bool, 256> may_begin_left_{};
  std::array<unsigned char, 128> ascii_{};  // what the character becomes, 0 for what its page has to say
  std::array<unsigned char, 256> inside_{};  // the same for what only goes on with a word, and 0 for all else
  std::array<std::atomic<const Page*>, NUM_PAGES> pages_{};
  std::vector<std::unique_ptr<const Page>> owned_pages_;
  std::mutex setting_page_;
};

}  // namespace fastrank
