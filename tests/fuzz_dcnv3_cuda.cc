// Runs the CUDA kernels' own code on the host (cuda_on_host), with blocks and threads in random order.
//
//   fuzz COUNT [SEED]   over random geometries, against the definition; then the last image of a huge batch
//   call SHARED         one call, with so many bytes of shared memory a block, from stdin: the integers of
//   `Header`, offset_scale as a
//                       double, then x, offset and mask (or the record), dy. Writes y and the gradients to
//                       stdout.
//
// Each backward runs twice, and a bit that differs is an error. tests/test_dcnv3_cuda.py builds this.
#include "dcnv3_cuda_backward.cu"
#include "dcnv3_cuda_forward.cu"
#include "dcnv3_cuda_spread.cu"

#include <cinttypes>

#include "fuzz_dcnv3.h"

namespace xla_ops::cuda {
alignas(128) unsigned char dynamic_shared_memory[cuda_on_host::kShared];
}

namespace {

using cuda_on_host::settings;

int64_t size_of(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

// What a call wrote, and the scratch it wrote with.
struct Gradients {
  explicit Gradients(const Call& call) {
    const Problem& s = call.problem;
    const int64_t positions = s.batch * s.positions();
    dx.resize(s.batch * s.height * s.width * s.channels() * size_of(call.type));
    doffset.resize(positions * call.offset.row * size_of(call.points_type));
    dweight.resize(positions * call.weight.row * size_of(call.points_type));
    scratch.resize(s.batch * (s.height * s.width + 1) * s.channels());
  }
  cudaError_t run(Call call, unsigned seed) {
    call.dx = dx.data(), call.doffset = doffset.data(), call.dweight = dweight.data();
    settings.seed = seed;
    return dcnv3::cuda::backward(nullptr, call, scratch.data());
  }
  bool operator==(const Gradients& other) const {
    return dx == other.dx && doffset == other.doffset && dweight == other.dweight;
  }
  std::vector<char> dx, doffset, dweight;
  std::vector<uint64_t> scratch;
};

bool run(const Call& call) {
  if (const char* why = dcnv3::cuda::refusal(call)) return std::printf("refused: %s\n", why), false;
  settings.seed = unsigned(engine());
  Gradients first(call), second(call);
  const Problem& s = call.problem;
  const bool early = engine() % 2;
  if (early) {
    const int64_t each = size_of(call.type), positions = s.batch * s.positions();
    cuda_on_host::of_kernel_before = {
        {call.x, s.batch * s.height * s.width * s.channels() * each},
        {call.offset.data, positions * call.offset.row * size_of(call.points_type)},
        {call.y, positions * s.channels() * each}};
  }
  const cudaError_t error = dcnv3::cuda::forward(nullptr, call, early);
  cuda_on_host::of_kernel_before.clear();
  if (error || first.run(call, unsigned(engine())) || second.run(call, unsigned(engine()))) {
    return std::printf("a launch failed\n"), false;
  }
  if (!(first == second)) return std::printf("a gradient depends on the order of blocks\n"), false;
  std::copy(first.dx.begin(), first.dx.end(), static_cast<char*>(call.dx));
  std::copy(first.doffset.begin(), first.doffset.end(), static_cast<char*>(call.doffset));
  std::copy(first.dweight.begin(), first.dweight.end(), static_cast<char*>(call.dweight));
  return true;
}

// Those blocks of each launch that compute the last image.
bool huge() {
  Huge both;
  char* scratch[] = {reserve((Huge::kMap + Huge::kChannels) * 8),
                     reserve((Huge::kLast + 1) * (Huge::kMap + Huge::kChannels) * 8)};
  if (!both.there() || !scratch[0] || !scratch[1]) {
    return std::printf("no room to reserve; the huge batch was not tried\n"), true;
  }
  if (dcnv3::cuda::refusal(both.whole)) return std::printf("the huge batch is refused\n"), false;
  settings.clear = false;       // reserved memory is zero
  settings.shared_limit = 512;  // for the form with scratch
  const Call* calls[] = {&both.alone, &both.whole};
  for (int i = 0; i < 2; ++i) {
    settings.part = calls[i]->problem.batch;
    if (dcnv3::cuda::forward(nullptr, *calls[i]) || dcnv3::cuda::backward(nullptr, *calls[i], scratch[i])) {
      return std::printf("a launch of the huge batch failed\n"), false;
    }
  }
  if (!both.same()) std::printf("the last image of a huge batch differs\n");
  return both.same();
}

// An image whose records' numbers do not count up to 2^32 is not one for the nine points' form.
bool records_fit() {
  Call call = {};
  Problem& s = call.problem;
  call.fused = true, call.type = Type::kBFloat16, call.offset.row = 32;
  s.kernel_h = s.kernel_w = 3, s.points = 9, s.group = 1, s.depth = 8;
  s.out_height = (1 << 14) - 1, s.out_width = 1 << 13;
  const bool below = dcnv3::cuda::has_nine(call);
  s.out_height += 2;
  if (below && !dcnv3::cuda::has_nine(call)) return true;
  return std::printf("the nine points' form takes other images than it can count in\n"), false;
}

// Which calls sum the gradient of x by slices of channels on a large GPU, and with how many threads a block.
bool slices_are_chosen() {
  const xla_ops::cuda::Device device = {227 << 10, 132};
  Call call = {};
  Problem& s = call.problem;
  call.fused = true, call.type = Type::kBFloat16, s.kernel_h = s.kernel_w = 3, s.points = 9;
  const auto threads = [&](int64_t batch, int64_t side, int64_t groups, int64_t depth) {
    s.batch = batch, s.height = s.width = s.out_height = s.out_width = side, s.group = groups,
    s.depth = depth;
    call.offset = {nullptr, (groups * 28 + 7) / 8 * 8, 28};
    return dcnv3::cuda::slice_threads(call, device);
  };
  const bool taken =
      threads(64, 56, 4, 16) == 512 && threads(64, 28, 4, 32) > 0 && threads(64, 7, 32, 16) > 0;
  const bool left = !threads(1, 56, 4, 16) && !threads(64, 64, 4, 16) && !threads(64, 56, 4, 8);
  if (taken && left) return true;
  return std::printf("other calls go by slices of channels than expected\n"), false;
}

// How many groups' maps a block has on a large GPU, forward and in the gradients of the learned numbers, and
// which sets of them several blocks share.
bool maps_are_chosen() {
  const xla_ops::cuda::Device device = {227 << 10, 132};
  const auto chosen = [&](int64_t batch, int64_t side, int64_t groups, int64_t depth, int team_words) {
    Problem s = {};
    s.batch = batch, s.height = s.width = s.out_height = s.out_width = side, s.group = groups,
    s.depth = depth;
    return dcnv3::cuda::shared_out(s, device, team_words);
  };
  for (int team_words : {dcnv3::cuda::kCellWords, dcnv3::cuda::kDotWords}) {
    bool right = !chosen(1, 56, 4, 16, team_words).groups && !chosen(64, 96, 4, 16, team_words).groups;
    struct {
      int64_t batch, side, groups, depth, whole, parts;
    } expected[] = {{64, 56, 4, 16, 256, 1}, {64, 56, 4, 32, 256, 1}, {64, 7, 32, 16, 256, 1},
                    {64, 56, 5, 16, 264, 2}, {64, 56, 7, 16, 396, 2}, {8, 56, 4, 16, 0, 4}};
    for (const auto& e : expected) {
      const dcnv3::cuda::Maps maps = chosen(e.batch, e.side, e.groups, e.depth, team_words);
      right &= maps.groups > 0 && maps.whole == e.whole && maps.parts == e.parts;
    }
    if (!right) return std::printf("other calls have maps in shared memory than expected\n"), false;
  }
  return true;
}

int fuzz(int count, int seed) {
  for (int i = 0; i < count; ++i) {
    engine.seed(seed + i);
    // A large GPU or a small one; the least is too little for the plane of a channel, wherever there is
    // scratch for that case.
    const size_t limits[] = {cuda_on_host::kShared, 48 << 10, 512};
    const int processors[] = {1, 8, 132};
    settings.shared_limit = limits[integer(0, 2)], settings.processors = processors[integer(0, 2)];
    if (one(run)) continue;
    std::printf("geometry of seed %d\n", seed + i);
    return 1;
  }
  if (!records_fit() || !slices_are_chosen() || !maps_are_chosen() || !huge()) return 1;
  std::printf("%d geometries\n", count);
  return 0;
}

template <class T>
bool take(std::vector<T>& values) {
  return values.empty() || std::fread(values.data(), sizeof(T), values.size(), stdin) == values.size();
}
void give(const std::vector<char>& bytes) {
  if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), stdout);
}

int call_from_stdin() {
  enum Header {
    kBatch,
    kHeight,
    kWidth,
    kOutHeight,
    kOutWidth,
    kGroup,
    kDepth,
    kKernelH,
    kKernelW,
    kStrideH,
    kStrideW,
    kPadH,
    kPadW,
    kDilationH,
    kDilationW,
    kRemoveCenter,
    kType,
    kPointsType,
    kFused,
    kCentre,
    kCount
  };
  std::vector<int64_t> h(kCount);
  std::vector<double> scale(1);
  if (!take(h) || !take(scale)) return 1;
  Call call = {};
  Problem& s = call.problem;
  s.batch = h[kBatch], s.height = h[kHeight], s.width = h[kWidth], s.out_height = h[kOutHeight];
  s.out_width = h[kOutWidth], s.group = h[kGroup], s.depth = h[kDepth], s.kernel_h = h[kKernelH];
  s.kernel_w = h[kKernelW], s.stride_h = h[kStrideH], s.stride_w = h[kStrideW], s.pad_h = h[kPadH];
  s.pad_w = h[kPadW], s.dilation_h = h[kDilationH], s.dilation_w = h[kDilationW];
  s.remove_center = h[kRemoveCenter], s.points = s.kernel_h * s.kernel_w - s.remove_center;
  s.offset_scale = scale[0];
  call.type = Type(h[kType]), call.points_type = Type(h[kPointsType]);
  call.fused = h[kFused], call.centre = h[kCentre];
  const int64_t each = (3 * s.points + 4) / 4 * 4, pairs = s.batch * s.positions() * s.group;
  call.offset = {nullptr, 2 * s.points * s.group, 2 * s.points};
  call.weight = {nullptr, s.points * s.group, s.points};
  if (call.fused) call.offset = {nullptr, (s.group * each + 7) / 8 * 8, each}, call.weight = {};
  const int64_t points = s.batch * s.positions() * size_of(call.points_type);
  std::vector<char> x(s.batch * s.height * s.width * s.channels() * size_of(call.type));
  std::vector<char> offset(points * call.offset.row), mask(points * call.weight.row);
  std::vector<char> y(pairs * s.depth * size_of(call.type)), dy(y.size());
  if (!take(x) || !take(offset) || !take(mask) || !take(dy)) return 1;
  call.x = x.data(), call.offset.data = offset.data(), call.weight.data = mask.data();
  call.y = y.data(), call.dy = dy.data();
  std::vector<char> dx(x.size()), doffset(offset.size()), dmask(mask.size());
  call.dx = dx.data(), call.doffset = doffset.data(), call.dweight = dmask.data();
  if (!run(call)) return 1;
  for (const auto& result : {y, dx, doffset, dmask}) give(result);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  cuda_on_host::shared = dcnv3::cuda::dynamic_shared_memory;
  if (argc > 2 && !std::strcmp(argv[1], "call")) {
    settings.shared_limit = std::atoi(argv[2]);
    return call_from_stdin();
  }
  return argc > 2 ? fuzz(std::atoi(argv[2]), argc > 3 ? std::atoi(argv[3]) : 0) : 2;
}
