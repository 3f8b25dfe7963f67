// Findings, and what it takes to name their places: addr2line for file and line, the module's own
// symbol table for the variables of static shared memory.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "state.h"

namespace vlm::emu {
namespace {

constexpr size_t kMostFindings = 20;

struct Finding {
  std::string where, text;
};

std::mutex g_lock;
std::vector<Finding> g_findings;
std::set<std::tuple<Kind, Pc, const void*>> g_known;
size_t g_dropped = 0;
std::string g_text;

// Without "(anonymous namespace)::", result and parameter types: what it is called in the source.
std::string short_name(std::string name) {
  constexpr std::string_view kAnonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(kAnonymous)) != std::string::npos;) {
    name.erase(at, kAnonymous.size());
  }
  std::string kept;
  int angles = 0, parentheses = 0;
  for (const char c : name) {
    if (angles == 0) parentheses += c == '(';
    if (parentheses == 0) {
      angles += (c == '<') - (c == '>');
      if (c == ' ' && angles == 0) {
        kept.clear();
      } else {
        kept += c;
      }
    }
    if (angles == 0) parentheses -= c == ')';
  }
  return kept;
}

std::string demangled(const char* symbol) {
  int status = 0;
  char* name = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  const std::string text = short_name(status == 0 ? name : symbol);
  std::free(name);
  return text;
}

// The thread-local variables of the module, by offset: its static shared memory.
std::vector<Variable> thread_local_variables(const std::string& path) {
  std::vector<Variable> variables;
  std::ifstream stream(path, std::ios::binary);
  const std::string file((std::istreambuf_iterator<char>(stream)), {});
  if (file.size() < sizeof(ElfW(Ehdr))) return variables;
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[i].sh_offset);
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t k = 0; k < sections[i].sh_size / sizeof(ElfW(Sym)); ++k) {
      const ElfW(Sym) & s = symbols[k];
      if (ELF64_ST_TYPE(s.st_info) != STT_TLS || s.st_shndx == SHN_UNDEF || s.st_size == 0)
        continue;
      variables.push_back({s.st_value, s.st_size, demangled(names + s.st_name)});
    }
  }
  std::sort(variables.begin(), variables.end(),
            [](const Variable& a, const Variable& b) { return a.offset < b.offset; });
  return variables;
}

int visit(dl_phdr_info* info, size_t, void* out) {
  auto& m = *static_cast<Module*>(out);
  const auto* base = reinterpret_cast<const char*>(info->dlpi_addr);
  const auto* self = reinterpret_cast<const char*>(&visit);
  const auto contains = [&](const ElfW(Phdr) & p, const char* address) {
    return p.p_type == PT_LOAD && address >= base + p.p_vaddr &&
           address < base + p.p_vaddr + p.p_memsz;
  };
  const auto* end = info->dlpi_phdr + info->dlpi_phnum;
  if (std::none_of(info->dlpi_phdr, end, [&](const auto& p) { return contains(p, self); }))
    return 0;
  m.base = base;
  for (const auto* p = info->dlpi_phdr; p != end; ++p) {
    const char* begin = base + p->p_vaddr;
    if (p->p_type == PT_LOAD) m.data.emplace_back(begin, begin + p->p_memsz);
    if (p->p_type != PT_TLS) continue;
    m.tls = static_cast<const char*>(info->dlpi_tls_data);
    m.tls_size = p->p_memsz;
  }
  return 1;
}

struct Frame {
  std::string function, file, line;
};

// Innermost first: addr2line knows the functions that were inlined.
std::vector<Frame> frames(size_t offset) {
  static std::mutex lock;
  static std::map<size_t, std::vector<Frame>> known;
  const std::lock_guard<std::mutex> guard(lock);
  if (const auto it = known.find(offset); it != known.end()) return it->second;
  char command[4096];
  std::snprintf(command, sizeof(command), "addr2line -e '%s' -i -f -C 0x%zx 2>/dev/null",
                module().file.c_str(), offset);
  std::vector<Frame> found;
  if (FILE* pipe = popen(command, "r")) {
    char line[8192];
    std::string function;
    for (bool is_function = true; std::fgets(line, sizeof(line), pipe) != nullptr;
         is_function = !is_function) {
      line[std::strcspn(line, "\n")] = '\0';
      if (is_function) {
        function = line;
        continue;
      }
      if (char* tail = std::strstr(line, " (discriminator")) *tail = '\0';
      const char* colon = std::strrchr(line, ':');
      if (colon == nullptr || *line == '?') continue;
      found.push_back({function, std::string(line, colon - line), colon + 1});
    }
    pclose(pipe);
  }
  return known[offset] = found;
}

bool in_shadow_headers(const Frame& frame) {
  return frame.file.find("emulation/include/") != std::string::npos;
}

std::string show(const Frame& frame) {
  // the part below the root of the repository
  for (const char* folder : {"csrc/", "tests/emulation/"}) {
    if (const size_t at = frame.file.rfind(folder); at != std::string::npos) {
      return frame.file.substr(at) + ":" + frame.line;
    }
  }
  return frame.file + ":" + frame.line;
}

size_t call_site(Pc pc) { return static_cast<const char*>(pc) - module().base - 1; }

std::string coordinates(Index i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

}  // namespace

const Module& module() {
  static const Module found = [] {
    Module m;
    // The block of this thread exists once its address was asked for. Other threads' blocks have
    // the same layout.
    const auto* lane = reinterpret_cast<const char*>(&t_lane);
    dl_iterate_phdr(visit, &m);
    m.tls_lane = lane - m.tls;
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&visit), &info);
    m.file = info.dli_fname;
    m.variables = thread_local_variables(m.file);
    return m;
  }();
  return found;
}

const char* thread_local_block() {
  return reinterpret_cast<const char*>(&t_lane) - module().tls_lane;
}

std::string place(Pc pc) {
  const std::vector<Frame> all = frames(call_site(pc));
  const auto it = std::find_if_not(all.begin(), all.end(), in_shadow_headers);
  if (it == all.end()) return "an unknown line";
  if (it + 1 == all.end()) return show(*it);
  return show(*it) + " (called from " + show(all.back()) + ")";
}

bool same_line(Pc a, Pc b) { return place(a) == place(b); }

std::string function_name(Pc pc) {
  const std::vector<Frame> all = frames(static_cast<const char*>(pc) - module().base);
  return all.empty() ? "an unknown kernel" : short_name(all.back().function);
}

std::string thread_name(int thread) {
  const unsigned t = thread;
  const Index n = g_block.launch.block;
  return coordinates({t % n.x, t / n.x % n.y, t / n.x / n.y});
}

// A place for a breakpoint: docs/emulation.md.
extern "C" __attribute__((noinline, used)) void vlm_emu_finding(const char* text) {
  asm volatile("" ::"r"(text) : "memory");
}

void report(Kind kind, const Lane* lane, Pc pc, const std::string& text, Pc other) {
  const std::lock_guard<std::mutex> lock(g_lock);
  const void* kernel = lane != nullptr ? g_block.launch.kernel : nullptr;
  if (!g_known.emplace(kind, pc, kernel).second) return;
  vlm_emu_finding(text.c_str());
  if (g_findings.size() == kMostFindings) {
    ++g_dropped;
    return;
  }
  Finding finding{"", text};
  if (const size_t at = text.find("%1"); at != std::string::npos) {
    finding.text.replace(at, 2, place(other));
  }
  if (lane != nullptr) {
    finding.where = "kernel " + function_name(kernel) + ", block " + coordinates(g_block.index) +
                    ", thread " + thread_name(lane->thread) + ", ";
  }
  finding.where += place(pc) + ": ";
  g_findings.push_back(std::move(finding));
}

const char* findings_text() {
  const std::lock_guard<std::mutex> lock(g_lock);
  if (g_findings.empty()) return nullptr;
  g_text = "the emulator found:";
  for (const Finding& f : g_findings) g_text += "\n  " + f.where + f.text;
  if (g_dropped != 0) g_text += "\n  and " + std::to_string(g_dropped) + " more";
  g_findings.clear();
  g_known.clear();
  g_dropped = 0;
  return g_text.c_str();
}

const char* take_findings() { return findings_text(); }

}  // namespace vlm::emu
