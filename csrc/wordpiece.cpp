#include "wordpiece.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fastrank {

namespace {

constexpr size_t TEXTS_A_TURN = 8;            // texts that a thread takes at once
constexpr size_t BYTES_WORTH_A_THREAD = 8192;  // less is read sooner than another thread wakes up

uint32_t decode(const unsigned char*& next) {  // one character of valid UTF-8
  const uint32_t first = *next++;
  if (first < 0x80) return first;
  const int more = first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
  uint32_t character = first & (0x3F >> more);
  for (int i = 0; i < more; ++i) character = character << 6 | (*next++ & 0x3F);
  return character;
}

bool continues(unsigned char byte) { return (byte & 0xC0) == 0x80; }

uint32_t hash_of(const char* word, size_t size) {
  uint64_t hash = size;
  for (; size >= 8; word += 8, size -= 8) {
    uint64_t eight;
    std::memcpy(&eight, word, 8);
    hash = (hash ^ eight) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  uint64_t rest = 0;
  for (size_t i = 0; i < size; ++i) rest = rest << 8 | static_cast<unsigned char>(word[i]);
  return uint32_t((hash ^ rest) * 0x9E3779B97F4A7C15u >> 32);
}

}  // namespace

WordTable::WordTable(const std::vector<std::pair<std::string, int32_t>>& vocabulary) : records_(1, '\0') {
  size_t size = 16;
  while (size < 2 * vocabulary.size()) size *= 2;
  slots_.resize(size);
  for (const auto& [word, id] : vocabulary) {
    const uint32_t hash = hash_of(word.data(), word.size()), count = uint32_t(word.size());
    size_t at = hash & (size - 1);
    while (slots_[at].place != 0) at = (at + 1) & (size - 1);
    slots_[at] = {hash, uint32_t(records_.size())};
    records_.append(reinterpret_cast<const char*>(&id), sizeof id);
    records_.append(reinterpret_cast<const char*>(&count), sizeof count);
    records_ += word;
  }
}

int32_t WordTable::find(std::string_view word) const {
  const uint32_t hash = hash_of(word.data(), word.size());
  for (size_t at = hash & (slots_.size() - 1); slots_[at].place != 0; at = (at + 1) & (slots_.size() - 1)) {
    if (slots_[at].hash != hash) continue;
    const char* const record = records_.data() + slots_[at].place;
    int32_t id;
    uint32_t count;
    std::memcpy(&id, record, sizeof id);
    std::memcpy(&count, record + sizeof id, sizeof count);
    if (count == word.size() && std::memcmp(record + sizeof id + sizeof count, word.data(), count) == 0) return id;
  }
  return -1;
}

ByteTree::ByteTree() : edges_(1024), ids_{-1}, mask_(1023) {}

void ByteTree::place(Edge edge) {
  uint32_t slot = hash(edge.key) & mask_;
  while (edges_[slot].key != NONE) slot = (slot + 1) & mask_;
  edges_[slot] = edge;
}

void ByteTree::insert(std::string_view word, int32_t id) {
  uint32_t node = ROOT;
  for (const unsigned char byte : word) {
    uint32_t child = step(node, byte);
    if (child == NONE) {
      child = uint32_t(ids_.size());
      if (child >= 1u << 24) throw std::invalid_argument("The vocabulary is too large.");
      ids_.push_back(-1);
      if (2 * ids_.size() > edges_.size()) {
        std::vector<Edge> old(2 * edges_.size());
        old.swap(edges_);
        mask_ = uint32_t(edges_.size() - 1);
        for (const Edge& edge : old)
          if (edge.key != NONE) place(edge);
      }
      place({node << 8 | byte, child});
    }
    node = child;
  }
  ids_[node] = id;
}

uint32_t ByteTree::walk(std::string_view word) const {
  uint32_t node = ROOT;
  for (const unsigned char byte : word) {
    if (node == NONE) break;
    node = step(node, byte);
  }
  return node;
}

struct WordPiece::Text {
  std::vector<int32_t>& ids;      // of all texts that this thread has read
  std::vector<uint32_t>& pages;   // missing ones
  std::string& word;              // the word that is being read
  State state = State::DONE;
};

WordPiece::WordPiece(const std::vector<std::pair<std::string, int32_t>>& vocabulary, const std::string& continuation,
                     int32_t unknown_id, int64_t max_characters, std::vector<std::string> left_to_reference)
    : words_(vocabulary), unknown_id_(unknown_id), max_characters_(max_characters), left_(std::move(left_to_reference)) {
  for (const auto& [word, id] : vocabulary) tree_.insert(word, id);
  continuation_ = tree_.walk(continuation);
  for (const auto& content : left_)
    if (!content.empty()) may_begin_left_[static_cast<unsigned char>(content[0])] = true;
}

void WordPiece::set_page(uint32_t page, const std::vector<std::string>& replacements) {
  if (page >= NUM_PAGES || replacements.size() != PAGE_SIZE) throw std::invalid_argument("no page of characters");
  const std::lock_guard<std::mutex> lock(setting_page_);
  if (pages_[page].load() != nullptr) return;
  auto made = std::make_unique<Page>();
  for (uint32_t i = 0; i < PAGE_SIZE; ++i) {
    made->begins[i] = uint32_t(made->bytes.size());
    made->bytes += replacements[i];
    if (page == 0 && i < 128 && replacements[i].size() == 1) ascii_[i] = static_cast<unsigned char>(replacements[i][0]);
  }
  if (page == 0)
    for (size_t i = 0; i < 128; ++i)
      if (ascii_[i] < 128 && !may_begin_left_[i]) inside_[i] = ascii_[i];
  made->begins[PAGE_SIZE] = uint32_t(made->bytes.size());
  owned_pages_.push_back(std::move(made));
  pages_[page].store(owned_pages_.back().get());
}

bool WordPiece::is_left(const char* bytes, const char* end) const {
  return std::any_of(left_.begin(), left_.end(), [&](const std::string& content) {
    return size_t(end - bytes) >= content.size() && std::memcmp(bytes, content.data(), content.size()) == 0;
  });
}

// Cuts the word into the longest pieces of the vocabulary, from its beginning on; a word that leaves a rest is unknown.
void WordPiece::finish_word(Text& text) const {
  const std::string& word = text.word;
  if (word.empty()) return;
  if (int64_t(word.size()) <= max_characters_)  // the whole word is the longest piece
    if (const int32_t id = words_.find(word); id >= 0) {
      text.ids.push_back(id);
      text.word.clear();
      return;
    }
  const size_t num_before = text.ids.size();
  bool known = int64_t(word.size()) <= max_characters_ ||
               word.size() - std::count_if(word.begin(), word.end(), continues) <= size_t(max_characters_);
  for (size_t begin = 0; known && begin < word.size();) {
    uint32_t node = begin == 0 ? ByteTree::ROOT : continuation_;
    size_t end = begin;
    int32_t id = -1;
    for (size_t i = begin; i < word.size() && node != ByteTree::NONE; ++i) {
      node = tree_.step(node, static_cast<unsigned char>(word[i]));
      if (node != ByteTree::NONE && tree_.id(node) >= 0) id = tree_.id(node), end = i + 1;
    }
    known = id >= 0;
    text.ids.push_back(id);
    begin = end;
  }
  if (!known) {
    text.ids.resize(num_before);
    text.ids.push_back(unknown_id_);
  }
  text.word.clear();
}

void WordPiece::read(std::string_view bytes, int64_t enough, Text& text) const {
  const auto* next = reinterpret_cast<const unsigned char*>(bytes.data());
  const auto* const end = next + bytes.size();
  const size_t limit = enough < 0 ? SIZE_MAX : text.ids.size() + size_t(enough);
  text.word.clear();
  while (next != end && text.ids.size() < limit) {
    if (const unsigned char becomes = inside_[*next]; becomes != 0) {
      text.word += char(becomes);
      ++next;
      continue;
    }
    if (may_begin_left_[*next] && is_left(reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(end))) {
      text.state = State::LEFT;
      return;
    }
    if (*next < 128) {
      const unsigned char becomes = ascii_[*next];
      if (becomes == WORD_END) {
        finish_word(text);
        ++next;
        continue;
      }
      if (becomes != 0 && becomes < 128) {
        text.word += char(becomes);
        ++next;
        continue;
      }
    }
    const uint32_t character = decode(next);
    const Page* page = pages_[character / PAGE_SIZE].load(std::memory_order_acquire);
    if (page == nullptr) {
      text.state = State::NEEDS_PAGES;
      text.pages.push_back(character / PAGE_SIZE);
      continue;
    }
    const auto* const replacement = reinterpret_cast<const unsigned char*>(page->bytes.data());
    const auto* byte = replacement + page->begins[character % PAGE_SIZE];
    const auto* const last = replacement + page->begins[character % PAGE_SIZE + 1];
    while (byte != last) {
      if (*byte == WORD_END) {
        finish_word(text);
        ++byte;
      } else if (*byte == ALONE) {
        finish_word(text);
        ++byte;
        do text.word += char(*byte++);
        while (byte != last && continues(*byte));
        finish_word(text);
      } else if (*byte == DEPENDS) {
        text.state = State::LEFT;
        return;
      } else {
        text.word += char(*byte++);
      }
    }
  }
  if (text.ids.size() < limit) finish_word(text);
}

WordPiece::Encoded WordPiece::encode(const std::vector<std::string_view>& texts, int64_t enough, int num_threads) const {
  struct Found {
    size_t thread, begin, count;
  };
  // Each is written with every character: none may share a line, or the one fetched with it, with another's.
  struct alignas(128) Thread {
    std::vector<int32_t> ids;
    std::vector<uint32_t> pages;
    std::string word;
  };
  size_t num_bytes = 0;
  for (const auto& text : texts) num_bytes += text.size();
  const auto useful = std::min<size_t>(size_t(std::max(num_threads, 1)), 1 + num_bytes / BYTES_WORTH_A_THREAD);
  const size_t num_turns = (texts.size() + TEXTS_A_TURN - 1) / TEXTS_A_TURN;

  std::vector<Found> found(texts.size());
  std::vector<Thread> threads(useful);
  Encoded encoded;
  encoded.states.resize(texts.size());
  encoded.ends.resize(texts.size());
  // Each thread reads into its own memory; which thread reads a text does not change its ids.
#pragma omp parallel for schedule(static, 1) num_threads(int(useful))
  for (size_t thread = 0; thread < useful; ++thread) {
    Thread& mine = threads[thread];
    for (size_t turn = thread; turn < num_turns; turn += useful) {
      const size_t begin = turn * TEXTS_A_TURN, end = std::min(begin + TEXTS_A_TURN, texts.size());
      for (size_t i = begin; i < end; ++i) {
        const size_t before = mine.ids.size();
        Text text{mine.ids, mine.pages, mine.word};
        read(texts[i], enough, text);
        if (text.state != State::DONE) mine.ids.resize(before);
        encoded.states[i] = text.state;
        found[i] = {thread, before, mine.ids.size() - before};
      }
    }
  }
  size_t total = 0;
  for (const Thread& thread : threads) total += thread.ids.size();
  encoded.ids.reserve(total);
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto begin = threads[found[i].thread].ids.begin() + int64_t(found[i].begin);
    encoded.ids.insert(encoded.ids.end(), begin, begin + int64_t(found[i].count));
    encoded.ends[i] = int64_t(encoded.ids.size());
  }
  for (const Thread& thread : threads) encoded.pages.insert(encoded.pages.end(), thread.pages.begin(), thread.pages.end());
  std::sort(encoded.pages.begin(), encoded.pages.end());
  encoded.pages.erase(std::unique(encoded.pages.begin(), encoded.pages.end()), encoded.pages.end());
  return encoded;
}

}  // namespace fastrank
